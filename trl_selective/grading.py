"""Was it right? Reward functions, called as TRL calls them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trl_selective.functional.advantages import total_reward
from trl_selective.reward_calls import call_reward, check_rewards

OWN_COLUMNS = ("prompt", "completion", "completion_ids")  # which TRL does not pass on from the dataset

Conversation = Sequence[Mapping[str, Any]]


def as_completion(prompt: str | Conversation, text: str) -> str | list[dict[str, str]]:
    """An answer in the form of its prompt: a text, or a conversation of one message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def reward_arguments(
    batch: Mapping[str, Sequence[Any]], texts: Sequence[str], completion_ids: Sequence[Sequence[int] | None]
) -> dict[str, Any]:
    """What TRL calls a reward function with: `prompts`, `completions`, `completion_ids`, and the other columns of the batch."""
    prompts = batch["prompt"]
    return {
        "prompts": prompts,
        "completions": [as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)],
        "completion_ids": completion_ids,
        **{name: values for name, values in batch.items() if name not in OWN_COLUMNS},
    }


def grade(
    reward_func: Callable,
    batch: Mapping[str, Sequence[Any]],
    texts: Sequence[str],
    completion_ids: Sequence[Sequence[int] | None],
) -> list[float | None]:
    """Rewards of answers to the prompts of a batch; None where the function does not apply.

    Args:
        reward_func: called with `prompts`, `completions`, `completion_ids`, and the other columns, as by `call_reward`.
        batch: columns of the dataset, with the column `prompt`.
        texts: one answer to each prompt.
        completion_ids: its token ids; None where they are not known.

    Raises:
        ValueError: if it returns anything but a number or None for each.
    """
    rewards = call_reward(reward_func, reward_arguments(batch, texts, completion_ids))
    return check_rewards(rewards, texts, reward_func.__name__)


def watched(reward_func: Callable, name: str, is_async: bool) -> Callable:
    """A reward function with two additions: an error that it raises carries its name, and what it returns is checked.

    Args:
        reward_func: called with `completions` and other keyword arguments.
        name: of the function.
        is_async: whether its result has to be awaited.
    """

    async def call_async(*, completions, **columns):
        with _naming(name):
            rewards = await reward_func(completions=completions, **columns)
        return check_rewards(rewards, completions, name)

    def call(*, completions, **columns):
        with _naming(name):
            rewards = reward_func(completions=completions, **columns)
        return check_rewards(rewards, completions, name)

    return call_async if is_async else call


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"It was raised by the reward function {name!r}.")
        raise


class Verifier:
    """The total reward of answers to one prompt: the weighted sum of several reward functions.

    Args:
        reward_funcs: as TRL takes them, possibly none.
        reward_weights: one for each; all 1 by default.

    Attributes:
        settings: the weight of each function by name.

    Raises:
        ValueError: if the weights are not as many as the functions.
    """

    def __init__(self, reward_funcs: Sequence[Callable], reward_weights: Sequence[float] | None = None):
        weights = [1.0] * len(reward_funcs) if reward_weights is None else list(reward_weights)
        if len(weights) != len(reward_funcs):
            raise ValueError(
                f"reward_weights has {len(weights)} weights for {len(reward_funcs)} reward_funcs: give one for each."
            )
        self.reward_funcs, self.weights = reward_funcs, weights
        self.settings = {func.__name__: weight for func, weight in zip(reward_funcs, weights, strict=True)}

    def __call__(
        self, row: Mapping[str, Any], texts: Sequence[str], completion_ids: Sequence[Sequence[int] | None]
    ) -> list[float | None]:
        """The reward of each answer to the prompt of a row of the dataset; None where no function applies."""
        if not texts or not self.reward_funcs:
            return [None] * len(texts)
        batch = {name: [value] * len(texts) for name, value in row.items()}
        graded = [grade(func, batch, texts, completion_ids) for func in self.reward_funcs]
        per_func = [[math.nan if reward is None else reward for reward in rewards] for rewards in graded]
        weights = torch.tensor(self.weights, dtype=torch.float64)
        totals = total_reward(torch.tensor(per_func, dtype=torch.float64).T, weights).tolist()
        return [None if math.isnan(total) else total for total in totals]
