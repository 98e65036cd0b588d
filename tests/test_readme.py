"""What the documents say holds: their code runs, the settings they list exist with these defaults, their links lead somewhere."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from trl_selective.config import DEFAULTS, GUIDANCE_FIELDS
from trl_selective.selection import SELECTORS

ROOT = Path(__file__).parents[1]
PYTHON_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n+)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
FENCED_OR_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r'\]\(<?([^)>\s]+)|(?:src|href)="([^"]+)"')


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """In order and in one namespace, beside the models of the quickstart. `<!-- not run: reason -->` above a block: it must compile only."""
    quickstart = tmp_path / "recipes" / "quickstart"
    quickstart.mkdir(parents=True)
    for name in ("policy", "expert"):
        (quickstart / name).symlink_to(ROOT / "recipes" / "quickstart" / name)
    monkeypatch.chdir(tmp_path)

    text, namespace = page.read_text(), {"__name__": "page"}
    for block in PYTHON_BLOCK.finditer(text):
        lines_above = text.count("\n", 0, block.start("code"))  # so that a traceback names the line of the page
        code = compile("\n" * lines_above + block["code"], page, "exec")
        if not block["reason"]:
            exec(code, namespace)


def listed_defaults(document: str) -> dict[str, object]:
    """Name -> default from the rows of all tables whose second column is called "default", e.g. "| `draft_length` | `None` | ... |"."""
    defaults, in_table, previous = {}, False, ""
    for line in document.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            in_table = False
        elif not previous.startswith("|"):
            in_table = len(cells) > 1 and cells[1].lower() == "default"
        elif in_table and set(cells[0]) - set(":-"):
            assert cells[0] not in defaults, f"{cells[0]} is listed twice"
            defaults[cells[0]] = float("inf") if cells[1] == "inf" else ast.literal_eval(cells[1])
        previous = line
    return defaults


def test_settings_are_listed_with_their_defaults():
    expected = {name: DEFAULTS.get(name) for name in {*GUIDANCE_FIELDS, "preset"}}
    assert listed_defaults((ROOT / "docs" / "settings.md").read_text()) == expected


def test_triggers_and_selectors_are_listed():
    page = (ROOT / "docs" / "settings.md").read_text().split("## Triggers and selectors")[1]
    listed = {
        name
        for line in page.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert set(SELECTORS) | {"always", "group_failed", "zero_variance", "below", "with_probability"} <= listed


def test_the_lowest_versions_are_the_lower_bounds():
    """`.ci/lowest.txt` repeats pyproject.toml, but for PyTorch. A bound of 1.14 is met by any 1.14.x."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = map(Requirement, project["dependencies"] + project["optional-dependencies"]["server"])
    bounds = {r.name: next(s.version for s in r.specifier if s.operator == ">=") for r in requirements}
    lines = (ROOT / ".ci" / "lowest.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert lowest.keys() == bounds.keys()
    for name in lowest.keys() - {"torch"}:
        assert f"{lowest[name]}.".startswith(f"{bounds[name]}.")


def test_relative_links_exist(project_files):
    broken = []
    for document in (path for path in project_files if path.suffix == ".md"):
        prose = FENCED_OR_CODE.sub("", document.read_text())
        targets = (markdown or html for markdown, html in LINK.findall(prose))
        broken += [
            f"{document.relative_to(ROOT)}: {target}"
            for target in targets
            if not re.match(r"[a-z]+:", target) and not leads_somewhere(document, *target.partition("#")[::2])
        ]
    assert not broken


def leads_somewhere(document: Path, path: str, heading: str) -> bool:
    """Whether a link in a document has a file behind it, and a heading where it names one."""
    target = document.parent / path if path else document
    if not target.exists() or not heading:
        return target.exists()
    headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
    return heading in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}
