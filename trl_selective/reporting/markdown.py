"""Pieces of Markdown."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a bar within a cell stays a bar."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def insert_before(text: str, mark: str, new: str) -> str:
    """`text` with the paragraph `new` before the line `mark`, or at the end where there is no such line."""
    before, found, after = f"\n{text}".partition(f"\n{mark}\n")
    return f"{before.rstrip()}\n\n{new}\n\n{mark}\n{after}"[1:] if found else f"{text.rstrip()}\n\n{new}\n"
