"""Calls a reward function outside of training as TRL calls it in training. Imports nothing large: see `grading_pool`."""

import asyncio
import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any


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
    given = {"trainer_state": None, "log_extra": _nowhere, "log_metric": _nowhere}
    parameters = inspect.signature(reward_func).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in given.items() if takes_all or name in parameters}


def _nowhere(name: str, value: Any) -> None: ...


async def _awaited(rewards: Any) -> Any:
    return await rewards
