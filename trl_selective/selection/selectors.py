"""Which of its completions a group gets: a selector scores them, and the one with the highest score is taken.

Selectors are combined: `a & b` wants both, by the sum of the ranks that either gives; `a | b` is a, and b where a finds none eligible.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trl_selective.functional.diversity import distinct_n
from trl_selective.selection.candidates import Candidates

if TYPE_CHECKING:
    from trl_selective.selection.learned import Learned

NOT_ELIGIBLE = -math.inf


class Selector(ABC):
    """Scores the completions of a group.

    Attributes:
        needs_logps: whether `Candidates.logps` must be there: costs a forward pass of the policy over all candidates.
        needs_gains: whether `Candidates.gains` must be there: costs the reward functions on all candidates.
    """

    needs_logps = False
    needs_gains = False

    @property
    def name(self) -> str:
        """What it is called in logs."""
        return type(self).__name__

    @abstractmethod
    def scores(self, candidates: Candidates) -> list[float]:
        """One score for each completion, the highest for the best; -inf for what must not be taken."""

    def decided_by(self, candidates: Candidates) -> str:
        """Name of the selector that has the say for this group."""
        return self.name

    def learners(self) -> list["Learned"]:
        """The selectors that it is made of and that learn."""
        return []

    def __and__(self, other: "Selector") -> "Selector":
        return Both(self, other)

    def __or__(self, other: "Selector") -> "Selector":
        return Fallback(self, other)


@dataclass(frozen=True)
class Pick:
    """A completion that was chosen: its index, its score, and the name of the selector that gave it."""

    index: int
    score: float
    selector: str


def choose(selector: Selector, candidates: Candidates, number: int) -> list[Pick]:
    """Choose up to `number` completions, one after the other, the first of equals first, none twice. `candidates.chosen` grows with them.

    Raises:
        ValueError: if the selector gives other than one score for each.
    """
    found: list[Pick] = []
    while len(found) < min(number, len(candidates)):
        decided_by = selector.decided_by(candidates)
        scores = selector.scores(candidates)
        if len(scores) != len(candidates) or any(math.isnan(score) for score in scores):
            raise ValueError(
                f"The selector {decided_by!r} returned {scores!r} for {len(candidates)} completions, expected a score for each, -inf for what must "
                "not be taken."
            )
        texts = [completion.token_ids for completion in candidates.completions]
        taken = {texts[index] for index in candidates.chosen}
        scores = [NOT_ELIGIBLE if text in taken else score for text, score in zip(texts, scores, strict=True)]
        best = max(range(len(scores)), key=scores.__getitem__)
        if scores[best] == NOT_ELIGIBLE:
            break
        candidates.chosen.append(best)
        found.append(Pick(best, scores[best], decided_by))
    return found


@dataclass(frozen=True)
class Pair(Selector):
    """Two selectors. What either needs is needed."""

    left: Selector
    right: Selector

    @property
    def needs_logps(self) -> bool:  # type: ignore[override]
        return self.left.needs_logps or self.right.needs_logps

    @property
    def needs_gains(self) -> bool:  # type: ignore[override]
        return self.left.needs_gains or self.right.needs_gains

    def learners(self) -> list["Learned"]:
        return self.left.learners() + self.right.learners()


class Both(Pair):
    """The sum of the ranks that two selectors give, in [0, 2]: 1 for the best of either, 0 for the worst; what one refuses is refused."""

    @property
    def name(self) -> str:
        return f"{self.left.name} & {self.right.name}"

    def scores(self, candidates: Candidates) -> list[float]:
        pairs = zip(*(_ranks(part.scores(candidates)) for part in (self.left, self.right)), strict=True)
        return [left + right for left, right in pairs]


class Fallback(Pair):
    """The first selector; the second where the first refuses all that are left."""

    @property
    def name(self) -> str:
        return f"{self.left.name} | {self.right.name}"

    def scores(self, candidates: Candidates) -> list[float]:
        return self._in_charge(candidates).scores(candidates)

    def decided_by(self, candidates: Candidates) -> str:
        return self._in_charge(candidates).decided_by(candidates)

    def _in_charge(self, candidates: Candidates) -> Selector:
        scores = self.left.scores(candidates)
        left_over = [score for index, score in enumerate(scores) if index not in candidates.chosen]
        return self.left if any(score > NOT_ELIGIBLE for score in left_over) else self.right


def _ranks(scores: list[float]) -> list[float]:
    """Share of the others that each score beats, equals counted half; what is refused stays refused."""
    others = max(len(scores) - 1, 1)
    return [
        NOT_ELIGIBLE
        if score == NOT_ELIGIBLE
        else (sum(other < score for other in scores) + (sum(other == score for other in scores) - 1) / 2) / others
        for score in scores
    ]


@dataclass(frozen=True)
class First(Selector):
    """The first one of the dataset, for data that is sorted already."""

    name = "first"

    def scores(self, candidates: Candidates) -> list[float]:
        return [-float(index) for index in range(len(candidates))]


@dataclass(frozen=True)
class Random(Selector):
    """Any one, all with the same probability."""

    name = "random"

    def scores(self, candidates: Candidates) -> list[float]:
        return list(candidates.noise)


@dataclass(frozen=True)
class Shortest(Selector):
    """The one with the fewest tokens."""

    name = "shortest"

    def scores(self, candidates: Candidates) -> list[float]:
        return [-float(len(completion.token_ids)) for completion in candidates.completions]


@dataclass(frozen=True)
class Learnable(Selector):
    """The one that the current policy finds most likely, by its mean log-probability per token: the nearest to what it can do already."""

    name = "learnable"
    needs_logps = True

    def scores(self, candidates: Candidates) -> list[float]:
        assert candidates.logps is not None
        return list(candidates.logps)


@dataclass(frozen=True)
class Novel(Selector):
    """The one that overlaps least with what was seen: the group's own rollouts, and completions injected into this prompt before.

    Args:
        n: length of the n-grams that are compared.
    """

    n: int = 3
    name = "novel"

    def scores(self, candidates: Candidates) -> list[float]:
        return candidates.novelty(self.n)


@dataclass(frozen=True)
class Diverse(Selector):
    """The one that makes the group most diverse: by the share of distinct n-grams in all texts of the group and this one (distinct-n,
    arXiv:1510.03055).

    Args:
        n: length of the n-grams that are counted.
    """

    n: int = 2
    name = "diverse"

    def scores(self, candidates: Candidates) -> list[float]:
        group = [*candidates.rollouts, *(candidates.completions[index].token_ids for index in candidates.chosen)]
        shares = [distinct_n([*group, completion.token_ids], self.n) for completion in candidates.completions]
        return [0.0 if math.isnan(share) else share for share in shares]


@dataclass(frozen=True)
class RewardGain(Selector):
    """The one with the largest reward. What is no better than the mean of the group's own rollouts is refused."""

    name = "reward_gain"
    needs_gains = True

    def scores(self, candidates: Candidates) -> list[float]:
        assert candidates.gains is not None
        return [gain if gain > 0 else NOT_ELIGIBLE for gain in candidates.gains]
