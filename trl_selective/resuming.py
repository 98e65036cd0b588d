"""Files that a kill leaves whole: one that is there or not, and a JSON Lines file that grows by one row after another, with which a later run goes on.

Beside `FILE`, the hidden `.FILE.settings` holds what its rows depend on, so that one file never mixes two settings.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class OtherRunError(ValueError):
    """A file is of other rows or settings than those that it should go on with."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, in whose place it is put once it is whole."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file, all of it or nothing."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def to_json(row: Mapping[str, Any], index: int) -> str:
    """One line, without its end.

    Raises:
        ValueError: naming the row, if JSON has no word for what it holds.
    """
    try:
        return json.dumps(row, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Row {index} cannot be written as JSON: {error}. Remove that column, or make it text."
        ) from error


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write down what the rows depend on, or compare it with what those in the file depend on.

    Raises:
        OtherRunError: naming the first setting that differs.
    """
    record = path.with_name(
        f".{path.name}.settings"
    )  # hidden, since `load_dataset` of the folder takes all other files for data
    if not path.exists():
        record.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        path.touch()  # not before the record is complete
        return
    then = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for name, value in settings.items():
        if name not in then or then[name] != value:
            raise OtherRunError(
                f"{path} was made with {name}={then.get(name, 'unknown')!r} according to {record.name}, got {value!r}. Go on with the settings "
                "of the file, name another one, or delete it."
            )


def count_rows(path: Path, rows: Sequence[Mapping[str, Any]] | Any) -> int:
    """The number of rows in the file. A last line that a kill cut off is removed.

    Args:
        path: of the file.
        rows: what each of its lines must contain, in order; a line may have more.

    Raises:
        OtherRunError: if a line is not of the row in its place.
    """
    done = end = 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            if done == len(rows):
                raise OtherRunError(
                    f"{path} has more rows than the dataset, {len(rows)}. Name another file, or delete it."
                )
            expected, found = json.loads(to_json(rows[done], done)), json.loads(line)
            if differing := [name for name, value in expected.items() if found.get(name) != value]:
                raise OtherRunError(
                    f"Row {done} of {path} is not that of the dataset: {differing} differ. The file was made from other data: go on with "
                    "that, name another file, or delete it."
                )
            done += 1
            end += len(line)
        file.truncate(end)
    return done
