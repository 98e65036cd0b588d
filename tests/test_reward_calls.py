"""Reward functions that train can be used outside of training."""

import asyncio
from functools import partial

import pytest

from trl_selective.reward_calls import call_reward

ARGUMENTS = {"completions": ["a", "bb"], "level": [1, 2]}


def with_logs(completions, trainer_state, log_extra, log_metric, **columns):
    log_extra("length", [len(text) for text in completions])
    log_metric("level", sum(columns["level"]))
    return [trainer_state]


async def awaited(completions, **columns):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


class Callable:
    async def __call__(self, completions, level):
        return level


@pytest.mark.parametrize(
    ("reward_func", "expected"),
    [
        (with_logs, [None]),
        (lambda completions, level: level, [1, 2]),  # takes what it takes, and no more
        (lambda **columns: sorted(columns), ["completions", "level", "log_extra", "log_metric", "trainer_state"]),
        (lambda completions, level, log_metric=None: [log_metric is not None], [True]),
        (awaited, [1.0, 2.0]),
        (Callable(), [1, 2]),
        (partial(lambda weight, **columns: [weight], 3), [3]),
    ],
)
def test_what_a_function_gets(reward_func, expected):
    assert call_reward(reward_func, ARGUMENTS) == expected


def test_a_column_of_that_name_wins():
    assert call_reward(lambda **columns: columns["trainer_state"], {**ARGUMENTS, "trainer_state": [7]}) == [7]


def test_in_a_notebook():
    """Whose cells run within an event loop."""

    async def cell():
        return call_reward(awaited, ARGUMENTS)

    assert asyncio.run(cell()) == [1.0, 2.0]
