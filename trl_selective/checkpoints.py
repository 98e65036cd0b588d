"""Which checkpoint can a run go on from? The last one that was written to its end.

A checkpoint is written file by file, `trainer_state.json` last, so that a run that is killed meanwhile leaves one without it. Transformers
resumes from the one with the highest number, whole or not.
"""

import json
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState

TRAINER_STATE = "trainer_state.json"


def damage(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being resumed from; None if it is whole. Of its tensors only the heads of files are read."""
    state = checkpoint / TRAINER_STATE
    if not state.is_file():
        return f"{TRAINER_STATE} is missing"
    try:
        TrainerState(**json.loads(state.read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        return f"{TRAINER_STATE} is damaged"
    for path in sorted(checkpoint.iterdir()):
        if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
        if path.suffix == ".safetensors" and not _is_whole(path):
            return f"{path.name} is cut off"
    return None


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def checkpoint_to_resume(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | bool | None:
    """
    `resume_from_checkpoint` as Transformers takes it, with `True` replaced by the last whole checkpoint. Those passed over are named in a
    warning.

    Raises:
        ValueError: if the checkpoint that is given, or all that there are, are not whole.
    """
    if not resume_from_checkpoint:
        return resume_from_checkpoint
    if resume_from_checkpoint is not True:
        checkpoint = Path(resume_from_checkpoint)
        if checkpoint.is_dir() and (reason := damage(checkpoint)):
            raise ValueError(
                f"{checkpoint} cannot be resumed from: {reason}. It was not written to its end. Resume from an earlier checkpoint, or with "
                "resume_from_checkpoint=True from the last whole one."
            )
        return resume_from_checkpoint
    skipped: list[str] = []
    for checkpoint in _checkpoints(Path(output_dir)):
        reason = damage(checkpoint)
        if reason is None:
            if skipped:
                warnings.warn(f"Resuming from {checkpoint.name}, since {'; '.join(skipped)}.", stacklevel=3)
            return str(checkpoint)
        skipped.append(f"{checkpoint.name} was not written to its end ({reason})")
    if skipped:
        raise ValueError(
            f"No checkpoint in {output_dir} can be resumed from: {'; '.join(skipped)}. Start anew, without resume_from_checkpoint."
        )
    return True  # there is none, as Transformers will say


def way_on(output_dir: str, step: int, *, since: float, resumed_from: str | None = None) -> str:
    """Where to go on when training has stopped at a step, in words: from the last whole checkpoint of this run, or from the start.

    Args:
        output_dir: with its checkpoints, and maybe those of other runs.
        step: at which it has stopped.
        since: when it began, seconds as of `time.time`: it has written no checkpoint before.
        resumed_from: the one that it began with.
    """
    own = (
        path
        for path in _checkpoints(Path(output_dir))
        if damage(path) is None and (path / TRAINER_STATE).stat().st_mtime >= since
    )
    last = next(own, resumed_from)
    start = (
        f"from its last checkpoint, with resume_from_checkpoint={str(last)!r}"
        if last
        else "again: it has no checkpoint"
    )
    return f"Training has stopped at step {step}. Once this is mended, start it {start}."


def _checkpoints(output_dir: Path) -> list[Path]:
    """The numbered checkpoints, the last one first."""
    numbered = {
        int(number): path
        for path in output_dir.glob("checkpoint-*")
        if path.is_dir() and (number := path.name.removeprefix("checkpoint-")).isdigit()
    }
    return [numbered[step] for step in sorted(numbered, reverse=True)]
