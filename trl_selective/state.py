"""The file in a checkpoint that holds what guidance knows: whole or not at all, and named where it is damaged."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_selective.resuming import write_whole

STATE_FILE = "guidance_state.json"


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` into a checkpoint, whole or not at all."""
    write_whole(folder / STATE_FILE, json.dumps(state))


@contextmanager
def saved_state(folder: Path) -> Iterator[dict[str, Any] | None]:
    """The state in a checkpoint, to be loaded inside the `with`; None if it was written without guidance.

    Raises:
        ValueError: if the file is damaged, or what is loaded from it does not fit.
    """
    path = folder / STATE_FILE
    try:
        yield _read(path) if path.exists() else None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or was written with other settings ({error!r}). Resume from an earlier checkpoint, or delete this file to start with a fresh threshold and "
            "memory."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    state = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(state, dict) or not state:
        raise TypeError(f"expected an object with entries, got {state!r}")
    return state
