"""Guidance by an expert that only draws: one behind a server, whose law nobody here sees."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from trl_selective.functional.mixed_policy import entropy, finite_log, probability_of
from trl_selective.rollout import GuidedRollout
from trl_selective.sampling.draw import ACCEPT, DRAFT, REPLACE, inverse_cdf
from trl_selective.sampling.live_rows import LiveRows
from trl_selective.sampling.sampler import GuidedSampler

SEEDS = 2**31


@runtime_checkable
class RemoteExpert(Protocol):
    """What is asked of an expert that is no model in this process.

    Attributes:
        vocab_size: it draws ids below this one.
        scores: whether it is asked for the probability of every token, once the rows are drawn.
    """

    vocab_size: int
    scores: bool

    def draw(self, texts: Sequence[Sequence[int]], seeds: Sequence[int], temperature: float) -> list[int]:
        """The next token of each text, from the expert's full distribution."""

    def completion_logps(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """log pi* of every completion token at temperature 1."""


class RemoteCoinSampler(GuidedSampler):
    """Draws from pi_mix by flipping a coin for every token, as `CoinSampler` does: heads with probability w, then the expert draws it, else the
    policy does. Of the expert it takes nothing but the tokens at heads, so that each is one short request.

    All rows keep step: at each position, the expert is asked for all rows at once whose coins show heads.

    What the expert would have said elsewhere stays unknown. With `expert.scores` it is asked for that as well, one request a row, and the record
    is that of the other samplers. Otherwise the rollout is not `is_scored`, and counts one expert forward per token at heads, on average w.
    """

    def __init__(self, policy: nn.Module, expert: RemoteExpert, *, vocab_size: int | None = None, **kwargs):
        super().__init__(policy, None, vocab_size=min(expert.vocab_size, vocab_size or expert.vocab_size), **kwargs)
        self.remote = expert

    def sample(self, prompt_ids: Sequence[Sequence[int]], *, temperature: float = 1.0, **kwargs) -> GuidedRollout:
        """Draw one completion for each prompt; arguments and errors as for the other samplers.

        Raises:
            ValueError: also if tokens are to be scored at another temperature than 1.
        """
        if self.remote.scores and temperature != 1:
            raise ValueError(
                f"An expert behind a server gives probabilities at temperature 1 alone, got {temperature}. Use that, or do not have tokens scored."
            )
        rollout = super().sample(prompt_ids, temperature=temperature, **kwargs)
        return (
            scored(rollout, prompt_ids, self.remote.completion_logps, self.vocab_size)
            if self.remote.scores
            else rollout
        )

    def _advance(self, live: LiveRows, entropy_threshold: float, temperature: float) -> None:
        num_rows, positions = len(live), live.positions(1)
        policy = self._probs(live.read_by_policy(), temperature)
        entropies = entropy(policy)
        weight = self._weight(live, entropies, entropy_threshold, positions)
        token = inverse_cdf(policy, live.noise(positions, DRAFT))
        is_heads = live.noise(positions, ACCEPT) < weight
        if asked := is_heads.squeeze(1).nonzero().squeeze(1).tolist():
            seeds = (live.noise(positions, REPLACE).squeeze(1)[asked] * SEEDS).long().tolist()
            drawn = self.remote.draw(live.texts(asked), seeds, temperature)
            token[asked, 0] = torch.tensor(drawn, device=token.device)

        policy_prob = probability_of(token, policy)
        policy_logp = finite_log(policy_prob)
        live.commit(
            torch.ones_like(live.position),
            token,
            sampling_per_token_logps=torch.where(weight == 0, policy_logp, math.nan),
            policy_per_token_logps=policy_logp,
            guidance_weights=weight,
            entropies=entropies,
            expert_drawn=is_heads,
        )
        if len(live) < num_rows:
            live.repack()


def scored(
    rollout: GuidedRollout,
    prompt_ids: Sequence[Sequence[int]],
    completion_logps: Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[Tensor]],
    vocab_size: int,
) -> GuidedRollout:
    """A rollout of coins with what the expert thinks of the tokens in it: their log pi_mix, and which of them the expert changed.

    Args:
        rollout: that is not `is_scored`.
        prompt_ids: of its rows.
        completion_logps: log pi* of every token of given completions after given prompts, for rows where w > 0.
        vocab_size: ids from here on have pi* = 0.
    """
    rows = [row for row, weights in enumerate(rollout.guidance_weights) if any(weights)]
    expert_logps = completion_logps([prompt_ids[row] for row in rows], [rollout.completion_ids[row] for row in rows])
    mixed, drawn = list(rollout.policy_per_token_logps), list(rollout.expert_drawn)
    for row, expert_logp in zip(rows, expert_logps, strict=True):
        weight = torch.tensor(rollout.guidance_weights[row], dtype=torch.float64)
        policy, expert = torch.tensor(mixed[row], dtype=torch.float64).exp(), expert_logp.double().exp()
        expert *= torch.tensor(rollout.completion_ids[row]) < vocab_size
        mixed[row] = ((1 - weight) * policy + weight * expert).log().tolist()
        is_changed = torch.rand(len(weight), dtype=torch.float64) < 1 - policy / expert
        drawn[row] = (torch.tensor(drawn[row]) & is_changed).tolist()
    return replace(rollout, sampling_per_token_logps=mixed, expert_drawn=drawn, is_scored=True)
