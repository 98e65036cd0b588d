"""What guidance costs. Ratios within a run can be trusted, seconds cannot."""

import argparse

from tests.benchmarks import sampling, training

BENCHMARKS = {"sampling": sampling, "training": training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, description=benchmark.__doc__, help=benchmark.__doc__)
        benchmark.add_arguments(command)
        command.set_defaults(main=benchmark.main)
    arguments = parser.parse_args()
    arguments.main(arguments)


if __name__ == "__main__":
    main()
