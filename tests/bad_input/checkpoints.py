"""Checkpoints that a run cannot go on from, or only without what guidance had learnt."""

import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.bad_input.case import Case, Error, Warned
from tests.training import GUIDED, INJECTED, PLAIN, expert_dataset, length_reward, make_trainer
from trl_selective.state import STATE_FILE

SAVING = {"save_strategy": "steps", "save_steps": 1, "reward_funcs": length_reward, "train_dataset": expert_dataset(8)}
Damage = Callable[[Path], None]


def trained(folder: Path, settings: dict = GUIDED, resume: str | bool | None = None, **changes):
    trainer = make_trainer(folder, **{**SAVING, "settings": settings, "max_steps": 2, **changes})
    trainer.train(resume)
    return trainer


@cache
def unbroken() -> tempfile.TemporaryDirectory:
    """The checkpoints of two guided steps, until Python ends."""
    folder = tempfile.TemporaryDirectory()
    trained(Path(folder.name))
    return folder


def run(folder: Path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(unbroken().name, folder / "run"))


def cut(name: str) -> Damage:
    """Half of a file, as a full disk or a power cut leaves it."""

    def damage(checkpoint: Path) -> None:
        path = checkpoint / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def without(name: str) -> Damage:
    return lambda checkpoint: (checkpoint / name).unlink()


def state(content: str) -> Damage:
    return lambda checkpoint: (checkpoint / STATE_FILE).write_text(content) and None


def resumed(given: str, damage: Damage, says: str) -> Case:
    """From this checkpoint."""

    def cause(folder: Path) -> None:
        path = run(folder)
        damage(path / "checkpoint-2")
        trained(path, resume=str(path / "checkpoint-2"), max_steps=3)

    return Error(given, cause, says)


def passes_over_the_last(folder: Path) -> None:
    path = run(folder)
    without("trainer_state.json")(path / "checkpoint-2")
    assert trained(path, resume=True, max_steps=3).state.global_step == 3


def finds_none_that_is_whole(folder: Path) -> None:
    path = run(folder)
    for number in (1, 2):
        without("trainer_state.json")(path / f"checkpoint-{number}")
    trained(path, resume=True)


def starts_guidance_in_the_middle(folder: Path) -> None:
    trained(folder, PLAIN, max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "error", "Guidance cannot start"
        )  # it waits for the first measurement, and nothing is wrong
        trainer = trained(folder, {**GUIDED, "entropy_threshold_init": None}, resume=True, max_steps=3)
    assert trainer.state.global_step == 3
    assert trainer._threshold.value > 0  # measured at the first step


def starts_injection_in_the_middle(folder: Path) -> None:
    path = run(folder)
    trainer = trained(path, {**GUIDED, "num_generations": 8, "num_injected_completions": 1}, resume=True, max_steps=3)
    assert trainer.state.global_step == 3


def changes_the_selector(folder: Path) -> None:
    trained(folder, INJECTED, max_steps=1)
    trained(folder, INJECTED, resume=True, injection_selector="learned")


SECTIONS = {
    "Checkpoints": (
        "With `trainer.train(resume_from_checkpoint=...)`, or `--resume_from_checkpoint`.",
        [
            resumed("`trainer_state.json`, which is written last, is missing", without("trainer_state.json"), "…/run/checkpoint-2 cannot be resumed from: trainer_state.json is missing. It was not written to its end. Resume from an earlier checkpoint, or with resume_from_checkpoint=True from the last whole one."),
            resumed("`trainer_state.json` is damaged", cut("trainer_state.json"), "…/run/checkpoint-2 cannot be resumed from: trainer_state.json is damaged. It was not written to its end. Resume from an earlier checkpoint, or with resume_from_checkpoint=True from the last whole one."),
            resumed("`optimizer.pt` is cut off", cut("optimizer.pt"), "…/run/checkpoint-2 cannot be resumed from: optimizer.pt is cut off. It was not written to its end. Resume from an earlier checkpoint, or with resume_from_checkpoint=True from the last whole one."),
            resumed("`rng_state.pth` is cut off", cut("rng_state.pth"), "…/run/checkpoint-2 cannot be resumed from: rng_state.pth is cut off. It was not written to its end. Resume from an earlier checkpoint, or with resume_from_checkpoint=True from the last whole one."),
            resumed("`model.safetensors` is cut off", cut("model.safetensors"), "…/run/checkpoint-2 cannot be resumed from: model.safetensors is cut off. It was not written to its end. Resume from an earlier checkpoint, or with resume_from_checkpoint=True from the last whole one."),
            Warned("the last one was not written to its end, with `True`", passes_over_the_last, "Resuming from checkpoint-1, since checkpoint-2 was not written to its end (trainer_state.json is missing)."),
            Error("none was written to its end, with `True`", finds_none_that_is_whole, "No checkpoint in …/run can be resumed from: checkpoint-2 was not written to its end (trainer_state.json is missing); checkpoint-1 was not written to its end (trainer_state.json is missing). Start anew, without resume_from_checkpoint."),
            Error("there is none, with `True`", lambda folder: trained(folder, resume=True), "No valid checkpoint found in output directory (…)"),
            Error("a folder that is not there", lambda folder: trained(folder, resume=str(folder / "absent")), "Can't find a valid checkpoint at …/absent"),
            resumed("`guidance_state.json` is empty", state(""), "…/run/checkpoint-2/guidance_state.json is damaged, or was written with other settings (JSONDecodeError('Expecting value: line 1 column 1 (char 0)')). Resume from an earlier checkpoint, or delete this file to start with a fresh threshold and memory."),
            resumed("`guidance_state.json` is no object", state("[]"), "…/run/checkpoint-2/guidance_state.json is damaged, or was written with other settings (TypeError('expected an object with entries, got []')). Resume from an earlier checkpoint, or delete this file to start with a fresh threshold and memory."),
            resumed("`guidance_state.json` is an empty object", state("{}"), "…/run/checkpoint-2/guidance_state.json is damaged, or was written with other settings (TypeError('expected an object with entries, got {}')). Resume from an earlier checkpoint, or delete this file to start with a fresh threshold and memory."),
            resumed("`guidance_state.json` has a text as threshold", state('{"entropy_threshold": "x", "entropy_counts": {}}'), "…/run/checkpoint-2/guidance_state.json is damaged, or was written with other settings (ValueError(\"could not convert string to float: 'x'\")). Resume from an earlier checkpoint, or delete this file to start with a fresh threshold and memory."),
            resumed("`guidance_state.json` has counts that are no object", state('{"entropy_threshold": 1.0, "entropy_counts": []}'), "…/run/checkpoint-2/guidance_state.json is damaged, or was written with other settings (AttributeError(\"'list' object has no attribute 'items'\")). Resume from an earlier checkpoint, or delete this file to start with a fresh threshold and memory."),
            resumed("`guidance_state.json` has counts of other entropies", state('{"entropy_threshold": 1.0, "entropy_counts": {"99999": 1}}'), "…/run/checkpoint-2/guidance_state.json is damaged, or was written with other settings (ValueError('counts out of range')). Resume from an earlier checkpoint, or delete this file to start with a fresh threshold and memory."),
            Error("`injection_selector='learned'`, from a checkpoint of another selector", changes_the_selector, "…/checkpoint-1/guidance_state.json is damaged, or was written with other settings (ValueError('0 selectors that learn, expected 1')). Resume from an earlier checkpoint, or delete this file to start with a fresh threshold and memory."),
            Warned("guidance, from a checkpoint without", starts_guidance_in_the_middle, "…/checkpoint-1 has no guidance_state.json: it was written without guidance, whose threshold starts fresh."),
            Warned("injection, from a checkpoint of guidance alone", starts_injection_in_the_middle, "…/run/checkpoint-2 holds no memory of injections: it was written without this kind of guidance, whose memory of injections starts fresh."),
        ],
    ),
}  # fmt: skip
