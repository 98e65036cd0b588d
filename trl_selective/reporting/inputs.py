"""What the reporting commands are given: names with their paths, and files of JSON."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NAMED = "a path, or NAME=PATH to choose the name that it is shown by"


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(default),
        metavar="FILE",
        help="picture: .png, .pdf or .svg (default: %(default)s)",
    )


def named_paths(arguments: Sequence[str]) -> dict[str, Path]:
    """Name -> path. Without `NAME=`, a path is called by its last part (a file without its suffix, a folder `evaluation` by the one before it), and
    by so many more that no two have one name.

    Raises:
        ValueError: if a path does not exist, or a name is given twice.
    """
    given = [(None, argument) if Path(argument).exists() else _split(argument) for argument in arguments]
    missing = [path for _, path in given if not Path(path).exists()]
    if missing:
        raise ValueError(f"There is no {', '.join(missing)}. Expected {NAMED}.")
    short = _short_names([Path(path).resolve() for name, path in given if name is None])
    names = [next(short) if name is None else name for name, _ in given]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is there twice. Tell them apart by NAME=PATH.")
    return {name: Path(path) for name, (_, path) in zip(names, given, strict=True)}


def read_json(path: Path) -> Any:
    """
    Raises:
        ValueError: if it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Is it still being written, or damaged?") from error


def read_lines(path: Path) -> list[dict]:
    """The rows of a file with one JSON object per line.

    Raises:
        ValueError: if it has none, or a line is something else.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(dict(json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}.") from error
    if not rows:
        raise ValueError(f"{path} is empty. Expected a JSON object on each line.")
    return rows


def _split(argument: str) -> tuple[str | None, str]:
    name, equals, path = argument.partition("=")
    return (name, path) if name and equals else (None, argument)


def _short_names(paths: Sequence[Path]) -> Iterator[str]:
    named = [
        path.parent if path.name == "evaluation" else path.with_suffix("") if path.is_file() else path
        for path in paths
    ]
    parts = [path.parts for path in named]
    names: list[str] = []
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(set(paths)):
            break
    return iter(names)
