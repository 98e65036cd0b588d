"""How far should the policy draft before the expert is asked? As far as gives most tokens for the time."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

FIRST_LENGTHS = (4, 2, 8)  # of the first rounds, so that a line can be laid through what they cost
PLAN = 8  # rounds that a length is chosen for; the last of them is shorter, so that the line rests on more than one
SHORTER = 1.5  # by this factor: a longer one could need a graph of its own on a GPU
WINDOW = 32  # rounds that the line is laid through
MEMORY = 0.95  # how much of its past acceptance each round keeps


@dataclass
class Lookahead:
    """Chooses how many tokens K the policy drafts in a round: as many as commit most tokens for the time, by the rounds so far.

    Tokens: each draft survives with probability s, so that a round commits m(K) = 1 + s + ... + s^(K-1) tokens per row.
    Seconds: a line a + b K through the last rounds, by the medians of Theil and Sen, which a few disturbed rounds do not move.
    Waiting: a batch ends with its slowest row, which is about one standard deviation behind in the end: over L tokens a share
    sqrt(v(K) / (m(K) L)) of the time, v(K) the variance of the tokens of one round.

    The choice is the K with the largest m(K) / ((a + b K) (1 + sqrt(v(K) / (m(K) L)))).

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
    _seen: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))  # lengths and seconds

    @property
    def survival(self) -> float:
        """The probability that a draft stands."""
        return 1 - self._rejected / self._tested

    def next_length(self, tokens_left: int) -> int:
        """How many drafts per row the next round should have.

        Args:
            tokens_left: that the row with most of them still has to get, at most.
        """
        plan, turn = divmod(self.rounds - len(FIRST_LENGTHS), PLAN)
        if plan >= 0 and turn == 0:
            self.length = self.best_length(tokens_left)
        if plan < 0:
            length = FIRST_LENGTHS[self.rounds]
        elif turn < PLAN - 1:
            length = self.length
        else:
            length = int(self.length / SHORTER) or 2
        return min(length, self.max_length, tokens_left)

    def best_length(self, tokens_left: int) -> int:
        """The length with most tokens for its cost, as far as is known."""
        slope, intercept = self.line()
        lengths = np.arange(1, self.max_length + 1)
        reach = self.survival ** (lengths - 1.0)
        tokens = reach.cumsum()
        variance = ((2 * lengths - 1) * reach).cumsum() - tokens**2
        waiting = 1 + np.sqrt(variance.clip(0) / (tokens * tokens_left))
        costs = waiting * (intercept + slope * lengths)
        return int(lengths[(tokens / costs).argmax()])

    def line(self) -> tuple[float, float]:
        """The seconds that a round takes: for each draft, and besides."""
        lengths, seconds = np.array(self._seen).T
        first, second = np.triu_indices(len(lengths), k=1)
        differ = lengths[first] != lengths[second]
        first, second = first[differ], second[differ]
        slopes = (seconds[first] - seconds[second]) / (lengths[first] - lengths[second])
        slope = max(0.0, float(np.median(slopes))) if len(slopes) else 0.0
        return slope, max(0.0, float(np.median(seconds - slope * lengths)))

    def observe(self, length: int, *, num_tested: int, num_rejected: int, seconds: float) -> None:
        """Take in one round.

        Args:
            length: drafts per row.
            num_tested: drafts that the expert came to: tokens committed, accepted or replaced.
            num_rejected: of these.
            seconds: time of the round.
        """
        self.rounds += 1
        self._tested = MEMORY * self._tested + num_tested
        self._rejected = MEMORY * self._rejected + num_rejected
        self._seen.append((length, seconds))
