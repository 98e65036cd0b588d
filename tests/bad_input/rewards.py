"""Reward functions that raise, return what is no reward, or never return: in a run with guided and injected rows."""

import asyncio
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, TrainerCallback

from tests.bad_input.case import Case, Error, Handled, Warned
from tests.models import COMMON
from tests.training import GUIDED, POLICY, expert_dataset, filler_reward, length_reward, make_trainer
from trl_selective import SelectiveGuidanceGRPOTrainer
from trl_selective.grading_pool import GradingPool

RUN = {
    **GUIDED,
    "num_generations": 8,
    "num_injected_completions": 1,
    "injection_trigger": "always",
    "max_completion_length": 16,
    "max_steps": 1,
    "overlong_expert_completions": "truncate",
}
ANEW = "Training has stopped at step 0. Once this is mended, start it again: it has no checkpoint."
ON = "Training has stopped at step 1. Once this is mended, start it from its last checkpoint, with resume_from_checkpoint='…checkpoint-1'."
LIST = "Have it return a list with a number for each, None where it does not apply."
ONE_EACH = "Have it return one for each, None where it does not apply."
FINITE = "Have it return a finite number, or None where it does not apply."


class Remember(TrainerCallback):
    """Keeps the parameters after each step."""

    def __init__(self, model):
        self.keep(model)

    def keep(self, model) -> None:
        self.parameters = {name: value.clone() for name, value in model.state_dict().items()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.keep(model)


def train(folder: Path, reward_funcs: Any, **changes) -> SelectiveGuidanceGRPOTrainer:
    """A run. If it breaks, nothing was updated since the last step."""
    trainer = make_trainer(folder, settings=RUN, reward_funcs=reward_funcs, train_dataset=expert_dataset(8), **changes)
    last = Remember(trainer.model)
    trainer.add_callback(last)
    try:
        trainer.train()
    except Exception:
        assert all(torch.equal(value, last.parameters[name]) for name, value in trainer.model.state_dict().items())
        raise
    return trainer


def returning(answer: Callable[[list], Any]) -> Callable:
    """A reward function that returns what `answer` makes of the completions."""

    def my_reward(completions, **kwargs):
        return answer(completions)

    return my_reward


def refused(given: str, answer: Callable[[list], Any], says: str) -> Case:
    """In the first step."""
    return Error(
        given,
        lambda folder: train(folder, returning(answer)),
        f"The reward function 'my_reward' returned {says}\n{ANEW}",
    )


def handled(given: str, says: str, *answers: Callable[[list], Any]) -> Case:
    """One reward function for each answer."""

    def cause(folder: Path) -> None:
        trainer = train(folder, [returning(answer) for answer in answers])
        assert trainer.state.log_history[0]["rewards/my_reward/mean"] > 0
        assert trainer.state.log_history[0]["grad_norm"] > 0

    return Handled(given, cause, says)


def one_bad(value: Any) -> Callable[[list], list]:
    """Good rewards, and `value` for the fourth completion."""
    return lambda completions: [*length_reward(completions[:3]), value, *length_reward(completions[4:])]


# ---- Functions that break ----------------------------------------------------------------------------------------------------------------


def breaks(folder: Path) -> None:
    def my_reward(completions, walls, **kwargs):
        return [walls["answer"]]

    train(folder, my_reward)


def breaks_later(folder: Path) -> None:
    def my_reward(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            raise KeyError("answer")
        return length_reward(completions)

    train(folder, [my_reward, length_reward], max_steps=2, save_strategy="steps", save_steps=1)


def breaks_while_awaited(folder: Path) -> None:
    async def my_reward(completions, **kwargs):
        raise ConnectionError("the judge is down")

    train(folder, my_reward)


def breaks_on_the_experts_word(folder: Path) -> None:
    """The policy hardly ever says it."""
    train(folder, returning(lambda completions: [float("nan") if "~" in text else 0.5 for text in completions]))


def breaks_as_a_model(folder: Path) -> None:
    config = LlamaConfig(**{**COMMON, "vocab_size": 45, "num_labels": 1})
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.constant_(model.score.weight, torch.nan)
    model.config.name_or_path = "my/judge"
    train(folder, model, init={"reward_processing_classes": AutoTokenizer.from_pretrained(POLICY)})


# ---- Functions that leave rows out ---------------------------------------------------------------------------------------------------------


def compares_a_group(folder: Path) -> None:
    def my_reward(completions, **kwargs):
        lengths = torch.tensor([float(len(text)) for text in completions]).view(-1, 8)
        return (lengths > lengths.mean(dim=1, keepdim=True)).float().flatten().tolist()

    train(folder, my_reward)


def leaves_all_out(folder: Path) -> None:
    trainer = train(folder, returning(lambda completions: [None] * len(completions)))
    start = make_trainer(folder, settings=RUN, train_dataset=expert_dataset(8)).model.state_dict()
    assert all(torch.equal(value, start[name]) for name, value in trainer.model.state_dict().items())


# ---- Functions that never return -----------------------------------------------------------------------------------------------------------


def is_awaited_for_a_while(folder: Path) -> None:
    async def judge(completion: str) -> float:
        await asyncio.sleep(3600 if completion.startswith("D") else 0)
        return 1.0

    async def my_reward(completions, **kwargs):
        return await asyncio.gather(*(bounded(completion) for completion in completions))

    async def bounded(completion: str) -> float | None:
        try:
            return await asyncio.wait_for(judge(completion), timeout=0.2)
        except TimeoutError:
            return None

    started = time.monotonic()
    trainer = train(folder, my_reward)
    assert time.monotonic() - started < 60
    assert trainer.state.log_history[0]["rewards/my_reward/mean"] == 1.0


NEVER = """
import time
def correct(completions, **kwargs):
    time.sleep(3600 if completions[0].startswith("D") else 0)
    return [1.0]
"""


def is_ended_in_a_process_of_its_own(folder: Path) -> None:
    (folder / "slow_verifier.py").write_text(NEVER)
    sys.path.insert(0, str(folder))
    try:
        correct = importlib.import_module("slow_verifier").correct
        with GradingPool(correct, timeout=0.2, num_workers=2) as pool:

            def my_reward(completions, **kwargs):
                verdicts = pool.grade([{"completions": [text]} for text in completions])
                return [0.0 if verdict.timed_out else verdict.reward for verdict in verdicts]

            trainer = train(folder, my_reward)
    finally:
        sys.path.remove(str(folder))
        del sys.modules["slow_verifier"]
    assert 0 < trainer.state.log_history[0]["rewards/my_reward/mean"] < 1


ABOUT = (
    "While guidance is on; without guidance all of this is TRL's. `None` leaves a row out, as in TRL, which takes NaN for `None`, too: here NaN is "
    "an error, since a 0 / 0 is no intention. Training waits for a reward function for as long as it takes, as TRL does (with several processes, "
    "until `ddp_timeout`): the last two rows show how to bound one that asks somebody, and one that computes."
)
SECTIONS = {
    "Reward functions": (
        ABOUT,
        [
            Error("one that raises", breaks, f"list indices must be integers or slices, not str\nIt was raised by the reward function 'my_reward'.\n{ANEW}", TypeError),
            Error("one that raises later", breaks_later, f"'answer'\nIt was raised by the reward function 'my_reward'.\n{ON}", KeyError),
            Error("an `async` one that raises", breaks_while_awaited,
                  f"the judge is down\nIt was raised by the reward function 'my_reward'.\n{ANEW}", ConnectionError),
            refused("one without a `return`", lambda completions: None, f"None of type NoneType for 16 completions. {LIST}"),
            refused("one number for all", lambda completions: 1.0, f"1.0 of type float for 16 completions. {LIST}"),
            refused("a dict", lambda completions: dict.fromkeys(completions, 1.0), f"… of type dict for 16 completions. {LIST}"),
            refused("a text", lambda completions: "1" * len(completions), f"'1111111111111111' of type str for 16 completions. {LIST}"),
            refused("too few rewards", lambda completions: [1.0], f"1 rewards for 16 completions. {ONE_EACH}"),
            refused("too many rewards", lambda completions: [1.0] * 17, f"17 rewards for 16 completions. {ONE_EACH}"),
            refused("a text among them", one_bad("0.5"), f"'0.5' for completion 3 of 16, '…'. {FINITE}"),
            refused("a list among them", one_bad([0.5]), f"[0.5] for completion 3 of 16, '…'. {FINITE}"),
            refused("NaN", one_bad(float("nan")), f"nan for completion 3 of 16, '…'. {FINITE}"),
            refused("infinity", one_bad(float("inf")), f"inf for completion 3 of 16, '…'. {FINITE}"),
            refused("what is infinite in float32", one_bad(1e39), f"1e+39 for completion 3 of 16, '…'. {FINITE}"),
            refused("NaN in a tensor", lambda completions: torch.full((16,), torch.nan), f"tensor(nan) for completion 0 of 16, '…'. {FINITE}"),
            Error("NaN for the expert's completions alone", breaks_on_the_experts_word,
                  f"The reward function 'my_reward' returned nan for completion … of …, '…~…'. {FINITE}\n{ANEW}"),
            Error("a reward model that gives NaN", breaks_as_a_model,
                  "The reward model 'judge' gives row 0 of the batch the reward nan, expected a finite number. Look for NaN or inf in its weights, or float16 "
                  f"overflow (load it in bfloat16 or float32).\n{ANEW}"),
            Error("`correctness_reward='accuracy'`, where there is no such function",
                  lambda folder: train(folder, [length_reward, filler_reward], correctness_reward="accuracy"),
                  "correctness_reward must be one of the reward functions ['length_reward', 'filler_reward'], got 'accuracy'. A function that shall "
                  "decide and not count may have the weight 0 in reward_weights."),
            Warned("one that gives up to 10, and `reward_range` unset",
                   lambda folder: train(folder, returning(lambda completions: [10 * reward for reward in length_reward(completions)])),
                   "Reward function 'my_reward' gives …, but with reward_range unset each is taken to span [0, 1]: guided and injected rows count too much or "
                   "too little, and a rollout is correct above half of that span. Set reward_range to the span of the total reward; and where it does not "
                   "begin at 0, correctness_reward to the function that tells right from wrong."),
            Warned("one that gives -1 or 1, and `reward_range=2.0`",
                   lambda folder: train(folder, returning(lambda completions: [-1.0, *[1.0] * (len(completions) - 1)]), reward_range=2.0),
                   "A rollout has the total reward -1, but those with more than half of reward_range=2 are taken to be correct, as if rewards lay between 0 "
                   "and it. Set reward_range to their span; and where they do not begin at 0, correctness_reward to the function that tells right from "
                   "wrong."),
            Warned("two for the format, always 1, beside one for the answer",
                   lambda folder: train(folder, [length_reward, *[returning(lambda completions: [1.0] * len(completions))] * 2]),
                   "All rollouts of a batch count as correct, since their total rewards (… to …) exceed half of reward_range: no group has failed, and none "
                   "can be rescued. If that is not so, set correctness_reward to that of ['length_reward', 'my_reward', 'my_reward'] which tells right from "
                   "wrong."),
            Error("one that compares the rollouts of a group, beside injection", compares_a_group,
                  "shape '[-1, 8]' is invalid for input of size …\nIt was raised by the reward function 'my_reward'.\nIt was given … expert completions of any "
                  f"groups: a function that compares the rollouts of a group cannot score them.\n{ANEW}", RuntimeError),
            Warned("`None` for all completions", leaves_all_out,
                   "…All reward functions returned None for the following kwargs:\n…\nPlease ensure that at least one reward function returns a valid reward."),
            handled("`None` for some", "Those rows are left out: no advantage, no part of the baseline.",
                    lambda completions: [None, *length_reward(completions[1:])]),
            handled("a tuple, an array, a tensor or a generator", "It is read as a list.",
                    lambda completions: tuple(length_reward(completions)), lambda completions: np.array(length_reward(completions), np.float32),
                    lambda completions: torch.tensor(length_reward(completions)), lambda completions: iter(length_reward(completions))),
            Handled("one that asks a judge who does not answer", is_awaited_for_a_while,
                    "With `await asyncio.wait_for(judge(completion), timeout=10)` in an `async` reward function, and `except TimeoutError: return None`, the row "
                    "is left out."),
            Handled("one that computes for ever", is_ended_in_a_process_of_its_own,
                    "In `trl_selective.grading_pool.GradingPool(correct, timeout=10)`, its process is ended; `pool.grade([{\"completions\": [text]} for text in "
                    "completions])` says which rows were not done in time. (`boxed_accuracy_reward` gives up on an answer after 5 seconds by itself.)"),
        ],
    ),
}  # fmt: skip
