"""Pictures and tables of what training and evaluation left behind: `python -m trl_selective.reporting COMMAND --help`."""

import argparse
from collections.abc import Sequence

from trl_selective.reporting import adoption, dynamics, pass_at_k, viewer

COMMANDS = (dynamics, pass_at_k, adoption, viewer)  # each has `add_command`, which sets the function that runs it


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. Input that cannot be used ends it with exit code 2 and one message."""
    parser = argparse.ArgumentParser(prog="python -m trl_selective.reporting", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_command(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
