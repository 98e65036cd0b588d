"""Pieces of Markdown."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a bar within a cell stays a bar."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def padded_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are numbers, to the right."""
    header, *rows = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    width = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        [line[0].ljust(width[0]), *(cell.rjust(each) for cell, each in zip(line[1:], width[1:], strict=True))]
        for line in (header, *rows)
    ]
    rule = ["-" * width[0], *("-" * (each - 1) + ":" for each in width[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def insert_before(text: str, mark: str, new: str) -> str:
    """`text` with the paragraph `new` before the line `mark`, or at the end where there is no such line."""
    before, found, after = f"\n{text}".partition(f"\n{mark}\n")
    return f"{before.rstrip()}\n\n{new}\n\n{mark}\n{after}"[1:] if found else f"{text.rstrip()}\n\n{new}\n"
