"""Do the tests find faults? Puts one after another into a copy of the package and runs the tests that should find it."""

import argparse
import sys

from tests.mutations import ALL_MUTATIONS
from tests.mutations.runner import CAUGHT, check_unchanged, judge_all


def main(arguments: list[str] | None = None) -> int:
    """Judge the mutations, print a table, and return 0 if all were caught, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", default="", help="mutations whose file or description contains this")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at a time (default: %(default)s)")
    parser.add_argument("--skip-unchanged", action="store_true", help="do not run the tests without mutation first")
    options = parser.parse_args(arguments)
    chosen = [m for m in ALL_MUTATIONS if options.only in m.file or options.only in m.breaks]
    if not chosen:
        parser.error(f"no mutation of {len(ALL_MUTATIONS)} has {options.only!r} in its file or description")
    if not options.skip_unchanged:
        check_unchanged(chosen)
    print("| file | fault | | by | s |\n|---|---|---|---|---|", flush=True)
    verdicts = []
    for verdict in judge_all(chosen, options.jobs):
        mutation = verdict.mutation
        cells = (mutation.file, mutation.breaks, verdict.outcome, verdict.by, f"{verdict.seconds:.0f}")
        print("|", " | ".join(" ".join(cell.split()) for cell in cells), "|", flush=True)
        verdicts.append(verdict)
    num_caught = sum(verdict.outcome == CAUGHT for verdict in verdicts)
    print(f"\n{num_caught} of {len(verdicts)} caught.")
    return 0 if num_caught == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
