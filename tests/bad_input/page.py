"""The table as a page."""

from tests.bad_input.case import Case, Error, Handled, Warned

HEAD = """# What goes wrong, and what it says

<!-- Written by `python -m tests.bad_input --write` from the table in tests/bad_input/, every row of which runs as a test. -->

{number} kinds of bad input, each with what comes of it. An error says what it got, what it expected, and the way out; nothing falls back silently
to plain GRPO. `…` stands for what differs from one machine to the next. Where a run stops in the middle, the error ends with where to go on.

| | |
|---|---|
| **stops** | with this error: before any model is loaded where settings are wrong, before the first step where models or data are, otherwise before the optimizer has changed anything |
| **warns** | once, and goes on |
| **goes on** | as described |
"""

OUTCOMES = {Error: "stops", Warned: "warns", Handled: "goes on"}


def page(sections: dict[str, tuple[str, list[Case]]]) -> str:
    """The whole page: a table for each section."""
    parts = [HEAD.format(number=sum(len(cases) for _, cases in sections.values()))]
    for title, (about, cases) in sections.items():
        parts.append(f"\n## {title}\n\n{about}\n\n| given | | |\n|---|---|---|\n")
        parts += [f"| {_cell(case.given)} | {OUTCOMES[type(case)]} | {_cell(_said(case))} |\n" for case in cases]
    return "".join(parts)


def _said(case: Case) -> str:
    """What is said as code, line by line; a description as it is."""
    if isinstance(case, Handled):
        return case.says
    return "\n".join(_code(line) for line in case.says.splitlines())


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _cell(text: str) -> str:
    """Inside a table a bar would end the cell, and a new line the row."""
    return text.replace("|", r"\|").replace("\n", "<br>")
