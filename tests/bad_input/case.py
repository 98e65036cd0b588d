"""One case of the table: what is given, how to cause it, and what has to come of it."""

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ANYTHING = "…"  # in an expected text: what depends on the machine, or is somebody else's


@dataclass(frozen=True)
class Case:
    """What is given, and what comes of it.

    Attributes:
        given: one line for a reader.
        cause: does it, in a folder of its own.
        says: the whole text, in which "…" stands for anything.
    """

    given: str
    cause: Callable[[Path], Any]
    says: str

    def check(self, folder: Path) -> None:
        """Cause it, and make sure of what comes of it."""
        raise NotImplementedError

    def is_said(self, text: str) -> bool:
        """Whether a text is the expected one."""
        pattern = ".*".join(re.escape(part) for part in self.says.split(ANYTHING))
        return re.fullmatch(pattern, text, re.DOTALL) is not None


@dataclass(frozen=True)
class Error(Case):
    """It ends with this error. Lines after the first are notes on it, which a traceback shows."""

    kind: type[BaseException] = ValueError

    def check(self, folder: Path) -> None:
        with pytest.raises(self.kind) as caught:
            self.cause(folder)
        text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
        assert self.is_said(text), f"{text!r} is not {self.says!r}"


@dataclass(frozen=True)
class Warned(Case):
    """It works, and this is said once, as a warning or in the log."""

    def check(self, folder: Path) -> None:
        with warnings.catch_warnings(record=True) as caught, _log() as lines:
            warnings.simplefilter("always")
            self.cause(folder)
        said = [*(str(warning.message) for warning in caught), *lines]
        assert [self.is_said(text) for text in said].count(True) == 1, f"{said} has not once {self.says!r}"


@dataclass(frozen=True)
class Handled(Case):
    """It works, and this is what becomes of it: `cause` asserts it."""

    def check(self, folder: Path) -> None:
        self.cause(folder)


@contextlib.contextmanager
def _log() -> Iterator[list[str]]:
    """What is logged meanwhile, as warnings or worse."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger().removeHandler(handler)
