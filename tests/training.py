"""Short training runs on the quickstart's task and models."""

import random
import sys
from pathlib import Path

from datasets import Dataset
from trl import GRPOConfig

from trl_selective import SelectiveGuidanceGRPOConfig, SelectiveGuidanceGRPOTrainer

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
POLICY, EXPERT = str(QUICKSTART / "policy"), str(QUICKSTART / "expert")
sys.path.insert(0, str(QUICKSTART))
from make_models import shortest_path  # noqa: E402
from task import path_reward, problems  # noqa: E402

PLAIN = {
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "max_steps": 3,
    "max_completion_length": 26,
    "learning_rate": 1e-3,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}
GUIDED = {
    **PLAIN,
    "num_guided_generations": 2,
    "guided_sampler": "stepwise",  # for runs that agree to the last bit
    "entropy_threshold_init": 1.0,
    "guidance_schedule": "constant",
    "guidance_steps": 100,
}
INJECTED = {
    **PLAIN,
    "num_injected_completions": 1,
    "guidance_schedule": "constant",
    "guidance_steps": 100,
}


def path_dataset(num_problems: int = 64) -> Dataset:
    rows = problems(num_problems, seed=1)
    return Dataset.from_list([{"prompt": p.prompt, "walls": p.walls, "start": p.start, "goal": p.goal} for p in rows])


def expert_dataset(num_problems: int = 64, num_completions: int = 2) -> Dataset:
    """The same problems, each with random shortest paths as expert completions, by two experts in turn."""
    rng, rows = random.Random(0), []
    for row, problem in zip(path_dataset(num_problems), problems(num_problems, seed=1), strict=True):
        completions = [shortest_path(problem, rng) for _ in range(num_completions)]
        sources = [f"expert {number % 2}" for number in range(num_completions)]
        rows.append({**row, "expert_completions": completions, "expert_sources": sources})
    return Dataset.from_list(rows)


def length_reward(completions, **kwargs) -> list[float]:
    """Longer is better: a reward with variance in nearly every group."""
    return [len(completion.split()) / 26 for completion in completions]


def filler_reward(completions, **kwargs) -> list[float]:
    """1 for an answer with the expert's filler word, which the policy hardly ever uses."""
    return [float("~" in completion) for completion in completions]


def make_trainer(
    folder,
    *,
    trainer_class=SelectiveGuidanceGRPOTrainer,
    config_class=SelectiveGuidanceGRPOConfig,
    model=POLICY,
    expert_model=EXPERT,
    reward_funcs=path_reward,
    train_dataset=None,
    settings=GUIDED,
    init=None,
    pictures=False,
    **changes,
):
    """A trainer with `settings` and `changes` to them; `init` goes to the trainer's constructor. With `pictures`, it leaves them as users get them."""
    args = config_class(str(folder), **{**settings, **changes})
    init = dict(init or {})
    if getattr(args, "num_guided_generations", 0):
        init["expert_model"] = expert_model
    trainer = trainer_class(
        model, reward_funcs, args, path_dataset() if train_dataset is None else train_dataset, **init
    )
    if not pictures:  # they take longer than the run
        trainer._save_picture = lambda: None
    return trainer


def make_plain_trainer(folder, trainer_class, config_class=GRPOConfig, **changes):
    return make_trainer(folder, trainer_class=trainer_class, config_class=config_class, settings=PLAIN, **changes)
