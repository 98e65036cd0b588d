"""The record of guided rollouts: which tokens, drawn by whom, with what probability. Checked once, where it is made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PER_TOKEN = (
    "completion_ids",
    "sampling_per_token_logps",
    "policy_per_token_logps",
    "guidance_weights",
    "entropies",
    "expert_drawn",
)


@dataclass
class GuidedRollout:
    """A batch of mixed-policy completions (arXiv:2510.04140, section 3), as the samplers return it.

    The first six fields are lists with one list per row; the inner lists of a row have one entry per completion token, the end token
    included.

    Attributes:
        completion_ids: token ids.
        sampling_per_token_logps: log pi_mix of each token, the law that really drew it (after temperature). NaN where it is not known: if
            not `is_scored`, where w > 0.
        policy_per_token_logps: log pi_theta of each token under the policy half of the mixture.
        guidance_weights: w in [0, 1].
        entropies: entropy of the policy in nats.
        expert_drawn: whether the expert changed the draw: the token is the replacement of a rejected draft, or would have been one under
            the same law. This happens with probability w TV(pi_theta, pi*). If not `is_scored`: whether the expert drew it, with
            probability w.
        policy_forwards: forward passes of the policy after the prompts, counted per row: a call on a batch of n rows counts n.
        expert_forwards: the same for the expert.
        num_drafted: tokens that the policy drafted, dropped ones included; 0 for a sampler that does not draft.
        is_scored: whether the probability of every token is known. Not with an expert that only draws (`RemoteCoinSampler`).

    Raises:
        ValueError: if a row is empty, if fields disagree in length, or if a probability is not one.
    """

    completion_ids: list[list[int]]
    sampling_per_token_logps: list[list[float]]
    policy_per_token_logps: list[list[float]]
    guidance_weights: list[list[float]]
    entropies: list[list[float]]
    expert_drawn: list[list[bool]]
    policy_forwards: int
    expert_forwards: int
    num_drafted: int = 0
    is_scored: bool = True

    def take(self, rows: Sequence[int]) -> "GuidedRollout":
        """The record of these rows, in this order, with the counts of all."""
        taken: dict[str, Any] = {name: [getattr(self, name)[row] for row in rows] for name in PER_TOKEN}
        return replace(self, **taken)

    def __post_init__(self):
        for name in PER_TOKEN:
            lengths, expected = [len(row) for row in getattr(self, name)], [len(row) for row in self.completion_ids]
            if lengths != expected:
                raise ValueError(
                    f"{name} must have one entry per token of completion_ids, got rows of {lengths}, expected {expected}."
                )
        known_logps = self.sampling_per_token_logps if self.is_scored else self.policy_per_token_logps
        name = "pi_mix" if self.is_scored else "pi_theta"
        for row, (ids, logps, weights) in enumerate(
            zip(self.completion_ids, known_logps, self.guidance_weights, strict=True)
        ):
            if not ids:
                raise ValueError(f"Row {row} is empty: a completion has at least one token, if only the end token.")
            for position, (logp, weight) in enumerate(zip(logps, weights, strict=True)):
                if not (math.isfinite(logp) and logp <= 1e-6 and 0 <= weight <= 1):
                    raise ValueError(
                        f"Row {row}, token {position} has log {name} = {logp} and guidance weight w = {weight}, expected a finite log-probability "
                        "and a weight in [0, 1]: the policy or the expert returned a distribution that is not finite. Look for NaN or inf "
                        "in their weights, a learning rate that is too high, or float16 overflow (use bfloat16)."
                    )

    @property
    def num_tokens(self) -> int:
        """Completion tokens of all rows."""
        return sum(map(len, self.completion_ids))

    def log_ratios(self) -> list[Tensor]:
        """log pi_theta - log pi_mix of each token: one float64 tensor per row."""
        rows = zip(self.policy_per_token_logps, self.sampling_per_token_logps, strict=True)
        return [
            torch.tensor(policy, dtype=torch.float64) - torch.tensor(mixed, dtype=torch.float64)
            for policy, mixed in rows
        ]
