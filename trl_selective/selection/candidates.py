"""What is known of one group when an expert completion is chosen for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from trl_selective.experts import ExpertCompletion
from trl_selective.functional.diversity import jaccard, n_grams


@dataclass
class Candidates:
    """The completions that a group may get, and what a selector may look at.

    Attributes:
        completions: all that fit, in the order of the dataset.
        rollouts: token ids of the group's own rollouts.
        rewards: their total rewards, NaN where no function scored one.
        success_rate: share of the group's own rollouts that are right.
        num_prompt_tokens: length of the prompt.
        noise: one number in [0, 1) for each completion.
        times_injected: how often each was injected into a group of this prompt before.
        chosen: indices of the completions that were chosen already.
        logps: mean log pi_theta per token of each completion under the current policy; only where a selector asks for it.
        gains: reward of each completion minus the mean of the group's own, NaN where no function scored it; only where asked for.
        features: what a selector that learns goes by, one row for each completion; only where there is one.
    """

    completions: Sequence[ExpertCompletion]
    rollouts: Sequence[Sequence[int]]
    rewards: Sequence[float]
    success_rate: float
    num_prompt_tokens: int
    noise: Sequence[float]
    times_injected: Sequence[int]
    chosen: list[int] = field(default_factory=list)
    logps: Sequence[float] | None = None
    gains: Sequence[float] | None = None
    features: Float[Tensor, "completions features"] | None = None

    def __len__(self) -> int:
        return len(self.completions)

    def seen(self) -> list[Sequence[int]]:
        """The texts that a new one may resemble: the group's own, those chosen already, and those injected into this prompt before."""
        return [
            *self.rollouts,
            *(
                completion.token_ids
                for index, completion in enumerate(self.completions)
                if index in self.chosen or self.times_injected[index]
            ),
        ]

    def novelty(self, n: int) -> list[float]:
        """1 - the largest n-gram overlap (Jaccard) of each completion with anything `seen`: 0 for a repetition, 1 for something all new."""
        others = [set(n_grams(text, n)) for text in {tuple(text) for text in self.seen()}]
        own = [set(n_grams(completion.token_ids, n)) for completion in self.completions]
        return [1 - max([jaccard(grams, other) for other in others], default=0.0) for grams in own]

    def share_of_new(self, n: int) -> list[float]:
        """Share of the n-grams of each completion that nothing `seen` has: coarser than `novelty`, and several times faster."""
        seen = {gram for text in self.seen() for gram in n_grams(text, n)}
        own = [set(n_grams(completion.token_ids, n)) for completion in self.completions]
        return [len(grams - seen) / max(len(grams), 1) for grams in own]
