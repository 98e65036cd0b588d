"""How far should the policy draft before the expert is asked? As far as gives most tokens for the time."""

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

FIRST_LENGTHS = (4, 2, 8)  # of the first rounds, so that a line can be laid through what the rest of a round costs
PLAN = 8  # rounds that a length is chosen for; the last of them tries another one, so that the line rests on more than one
TRY_FACTOR = 1.5  # by which the other length is larger, or smaller, in turn
WINDOW = 32  # rounds that the line is laid through
MEMORY = 0.95  # how much of its past acceptance each round keeps


@dataclass
class Lookahead:
    """Chooses the number of drafts of each round from the acceptance and the times of the rounds so far.

    What a round of K drafts yields, if each of them survives with probability s: 1 + s + ... + s^(K-1) tokens per row. What it costs, in policy
    forwards: K, and what the rest of a round takes, for which a straight line in K is laid through the last rounds (by Theil and Sen: a few
    rounds that other work on the machine disturbed do not move it). The K with most tokens for its cost is chosen.

    That a draft cannot be rejected is sometimes known at once: its acceptance number u is drawn with it, and one with u < 1 - w stands
    whatever the expert says (Eq. 7). To end each round by that was measured to gain nothing over lengths that are planned, which
    need not wait for the device at every draft.

    The draft length changes the cost of a rollout, not the rollout (`sampling/draw.py`), but for rounding in the last digit. Who needs runs
    that agree to the last bit sets a fixed length.

    Attributes:
        max_length: never draft further.
        length: the choice, once there is one.
    """

    max_length: int = 16
    rounds: int = 0
    length: int = 1
    _tested: float = 2.0  # as if one of two had fallen
    _rejected: float = 1.0
    _seen: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))  # lengths and costs

    @property
    def survival(self) -> float:
        """The probability that a draft stands."""
        return 1 - self._rejected / self._tested

    def next_length(self) -> int:
        """How many drafts per row the next round should have."""
        plan, turn = divmod(self.rounds - len(FIRST_LENGTHS), PLAN)
        if plan < 0:
            return min(FIRST_LENGTHS[self.rounds], self.max_length)
        if turn == 0:
            self.length = self.best_length()
        if turn < PLAN - 1:
            return self.length
        other = math.ceil(self.length * TRY_FACTOR) if plan % 2 else int(self.length / TRY_FACTOR)
        return min(max(1, other), self.max_length)

    def best_length(self) -> int:
        """The length with most tokens for its cost, as far as is known."""
        slope, intercept = self.line()
        lengths = np.arange(1, self.max_length + 1)
        tokens = (self.survival ** (lengths - 1)).cumsum()
        costs = lengths + np.maximum(0, intercept + slope * lengths)
        return int(lengths[(tokens / costs).argmax()])

    def line(self) -> tuple[float, float]:
        """Slope and intercept of what the rest of a round costs, in policy forwards."""
        lengths, costs = np.array(self._seen).T
        first, second = np.triu_indices(len(lengths), k=1)
        differ = lengths[first] != lengths[second]
        first, second = first[differ], second[differ]
        slopes = (costs[first] - costs[second]) / (lengths[first] - lengths[second])
        slope = max(0.0, float(np.median(slopes))) if len(slopes) else 0.0
        return slope, float(np.median(costs - slope * lengths))

    def observe(
        self, length: int, *, num_tested: int, num_rejected: int, policy_seconds: float, rest_seconds: float
    ) -> None:
        """Take in one round.

        Args:
            length: drafts per row.
            num_tested: drafts that the expert came to: tokens committed, accepted or replaced.
            num_rejected: of these.
            policy_seconds: time of `length` policy forwards.
            rest_seconds: time of the rest: of the expert's forward, and of judging and writing down what was drafted.
        """
        self.rounds += 1
        self._tested = MEMORY * self._tested + num_tested
        self._rejected = MEMORY * self._rejected + num_rejected
        self._seen.append((length, rest_seconds * length / policy_seconds))
