"""Write the page, or say whether it is up to date."""

import argparse
import sys

from tests.bad_input.page import page
from tests.bad_input.table import PAGE, SECTIONS


def main(arguments: list[str] | None = None) -> int:
    """0 if the page is what the table says."""
    parser = argparse.ArgumentParser(prog="python -m tests.bad_input", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args(arguments)
    text = page(SECTIONS)
    if options.write:
        PAGE.write_text(text)
    is_current = PAGE.exists() and PAGE.read_text() == text
    print(f"{PAGE.name} is {'up to date' if is_current else 'out of date: run it with --write'}.")
    return 0 if is_current else 1


if __name__ == "__main__":
    sys.exit(main())
