"""Calls a reward function outside of training as TRL calls it in training, and checks what it returns. Imports nothing large: see `grading_pool`."""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

LARGEST = (2 - 2**-23) * 2**127  # of float32, which rewards become
PREVIEW = 60  # characters of a value in a message


def _nowhere(name: str, value: Any) -> None: ...


# What TRL gives to reward functions beside prompts, completions and columns.
GIVEN = {"trainer_state": None, "log_extra": _nowhere, "log_metric": _nowhere}


def call_reward(reward_func: Callable, arguments: Mapping[str, Any]) -> Any:
    """What it returns, once it was awaited if it is asynchronous.

    Args:
        reward_func: gets what TRL passes beside the columns as well, if it takes that: there is no `trainer_state` here, and what it gives to
            `log_extra` and `log_metric` goes nowhere.
        arguments: `prompts`, `completions`, `completion_ids`, and columns.
    """
    rewards = reward_func(**{**_taken(reward_func), **arguments})
    if not inspect.isawaitable(rewards):
        return rewards
    with ThreadPoolExecutor(1) as thread:  # which has no event loop yet, as that of a notebook has
        return thread.submit(asyncio.run, _awaited(rewards)).result()


def _taken(reward_func: Callable) -> dict[str, Any]:
    parameters = inspect.signature(reward_func).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in GIVEN.items() if takes_all or name in parameters}


async def _awaited(rewards: Any) -> Any:
    return await rewards


def check_rewards(rewards: Any, completions: Sequence[Any], name: str) -> list[Any]:
    """What a reward function returned, as a list of numbers and None. NaN is refused: TRL could not tell it from None, and a 0 / 0 would pass for a row that was
    left out on purpose.

    Args:
        rewards: whatever it returned.
        completions: which it was asked about.
        name: of the function.

    Raises:
        ValueError: naming the function and the completion.
    """
    is_list = (
        hasattr(rewards, "__iter__") and getattr(rewards, "ndim", 1) > 0 and not isinstance(rewards, (str, Mapping))
    )
    if not is_list:
        raise ValueError(
            f"The reward function {name!r} returned {preview(rewards)} of type {type(rewards).__name__} for {len(completions)} completions. "
            "Have it return a list with a number for each, None where it does not apply."
        )
    rewards = list(rewards)
    if len(rewards) != len(completions):
        raise ValueError(
            f"The reward function {name!r} returned {len(rewards)} rewards for {len(completions)} completions. Have it return one "
            "for each, None where it does not apply."
        )
    for number, reward in enumerate(rewards):
        if reward is not None and not _is_finite(reward):
            raise ValueError(
                f"The reward function {name!r} returned {preview(reward)} for completion {number} of {len(completions)}, "
                f"{preview(completions[number])}. Have it return a finite number, or None where it does not apply."
            )
    return [None if reward is None else float(reward) for reward in rewards]


def _is_finite(reward: Any) -> bool:
    try:
        return math.isfinite(reward) and abs(float(reward)) <= LARGEST
    except (OverflowError, TypeError, ValueError):
        return False


def preview(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= PREVIEW else f"{text[:PREVIEW]}..."
