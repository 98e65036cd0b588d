"""Reward functions see what TRL shows them, and their sum is TRL's."""

import pytest

from trl_selective.grading import Verifier, grade

ROW = {"prompt": "2 + 2 =", "solution": 4, "completion": "hidden", "completion_ids": [9]}


def test_what_a_reward_function_sees():
    seen = {}

    def spy(prompts, completions, completion_ids, level=None):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, level=level)
        return [0.0, None]

    assert grade(spy, {"prompt": ["a", "b"], "level": [1, 2], "completion": ["x", "y"]}, ["A", "B"], [[5], None]) == [
        0.0,
        None,
    ]
    assert seen == {"prompts": ["a", "b"], "completions": ["A", "B"], "completion_ids": [[5], None], "level": [1, 2]}
    conversation = [{"role": "user", "content": "a"}]
    grade(spy, {"prompt": [conversation] * 2}, ["A", "B"], [None, None])
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in "AB"]


def is_solution(completions, solution, **kwargs):
    return [float(text == str(right)) for text, right in zip(completions, solution, strict=True)]


def is_short(completions, **kwargs):
    return [None if text == "?" else float(len(text) == 1) for text in completions]


def nothing(completions, **kwargs):
    return [None] * len(completions)


def test_a_verifier_adds_up_what_applies():
    """0.75 right + 0.25 short: 0.75 + 0.25, then 0 + 0.25, then 0 + 0, then 0 + nothing."""
    verifier = Verifier([is_solution, is_short], [0.75, 0.25])
    assert verifier(ROW, ["4", "5", "55", "?"], [None] * 4) == [1.0, 0.25, 0.0, 0.0]
    assert verifier.settings == {"is_solution": 0.75, "is_short": 0.25}
    assert Verifier([is_solution, nothing])(ROW, ["4"], [None]) == [1.0]
    assert Verifier([nothing])(ROW, ["4", "5"], [None, None]) == [None, None]


async def awaited(completions, trainer_state, **kwargs):
    return [1.0] * len(completions)


def test_a_function_that_trains_is_called_as_trl_calls_it():
    assert Verifier([awaited])(ROW, ["4", "5"], [None, None]) == [1.0, 1.0]


def test_nothing_to_ask():
    assert Verifier([])(ROW, ["4"], [None]) == [None]
    assert Verifier([is_solution])(ROW, [], []) == []


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="reward_weights has 1 weights for 2 reward_funcs: give one for each"):
        Verifier([is_solution, nothing], [1.0])
    with pytest.raises(
        ValueError, match=r"'<lambda>' returned 1 rewards for 2 completions\. Have it return one for each"
    ):
        Verifier([lambda **columns: [1.0]])(ROW, ["4", "5"], [None, None])
