"""The study's models: small Llamas, trained from nothing, each made once and kept in a folder.

| name | what it learns from |
|---|---|
| `expert` | shortest walks, with fillers: strong, and redundant in style |
| `weak_expert` | the same, for an eighth of the steps |
| `wrong_expert` | the expert, then shortest walks to wrong goals |
| `independent` | a corpus of its own, from its own start: random walks, and few shortest ones, to near goals alone: far problems are a gap in its support |
| `unlearned` | the expert, then random walks, few of which end at their goal: the skill is there, hidden |
| `easier` | the same, with twice as many that do |

Those of 165 thousand parameters that the quickstart ships are taken from there: expert and unlearned base of `grid`.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from make_models import fine_tune, make_model, make_tokenizer
from tasks import Task, aimless_example, corpus_example, expert_example, wrong_example
from transformers import AutoModelForCausalLM

from trl_selective.experts import accelerator_or_cpu

QUICKSTART = Path(__file__).parent.parent / "quickstart"
SHIPPED = {("grid", "expert"): QUICKSTART / "expert", ("grid", "unlearned"): QUICKSTART / "policy"}


TINY = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


@dataclass(frozen=True)
class Recipe:
    """What a model is trained on, for how many steps of 128 examples, how fast; from random weights, or from another model. The learning
    rate is for models as wide as `TINY`; it falls as they get wider, in proportion (muP, arXiv:2203.03466)."""

    example: Callable
    steps: int
    learning_rate: float
    seed: int
    start: str | None = None


RECIPES = {
    "expert": Recipe(expert_example, 3000, 3e-3, seed=0),
    "weak_expert": Recipe(expert_example, 400, 3e-3, seed=1),
    "wrong_expert": Recipe(wrong_example, 300, 1e-3, seed=2, start="expert"),
    "independent": Recipe(partial(corpus_example, solved=0.1), 3000, 3e-3, seed=3),
    "unlearned": Recipe(partial(aimless_example, hindsight=0.08), 300, 1e-3, seed=4, start="expert"),
    "easier": Recipe(partial(aimless_example, hindsight=0.15), 300, 1e-3, seed=5, start="expert"),
}


def make(task: Task, name: str, folder: Path, size: dict[str, int] = TINY, steps: int | None = None) -> Path:
    """The folder of a model, which is trained first if it is not there.

    Args:
        size: `hidden_size`, `num_hidden_layers` and `num_attention_heads`.
        steps: of training; None for those of the recipe.
    """
    path = folder / task.name / name
    if (path / "config.json").exists():
        config = json.loads((path / "config.json").read_text())
        if {key: config[key] for key in size} != size:
            raise ValueError(
                f"{path} is there, but not as large as the settings say ({size}). Choose another --output_dir."
            )
        return path
    if (task.name, name) in SHIPPED and size == TINY:
        with whole(path) as unfinished:
            shutil.copytree(SHIPPED[task.name, name], unfinished)
        return path
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    tokenizer = make_tokenizer(task.words)
    model = make_model(tokenizer, **size)
    if recipe.start is not None:
        start = make(task, recipe.start, folder, size, steps)
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    fine_tune(
        model.to(accelerator_or_cpu()),
        tokenizer,
        partial(recipe.example, task),
        steps=steps or recipe.steps,
        learning_rate=recipe.learning_rate * TINY["hidden_size"] / size["hidden_size"],
        seed=100 + recipe.seed,
        description=f"{task.name}: {name}",
    )
    with whole(path) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when it is full: an interrupted run leaves no half of a model."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    unfinished.rename(path)
