"""How far should the policy draft before the expert is asked? As far as another draft is worth its time."""

from dataclasses import dataclass

FIRST_LENGTHS = (4, 2, 8)  # of the first rounds, so that a line can be laid through what the rest costs
MEMORY = 0.95  # how much of the past each round keeps
LINE_MEMORY = 0.99  # the same for the line, which needs rounds of different lengths
MIN_SPREAD = 1e-3  # relative variance of the lengths below which they say nothing about the slope


@dataclass
class Lookahead:
    """Decides after each draft of a round whether the next one pays, from acceptance and forward costs measured so far.

    What a draft is worth: whether a draft can be rejected at all is known before the expert is asked. Its acceptance number u is drawn with
    it, and a draft with u < 1 - w stands whatever the expert says (Eq. 7). Only the others are *at stake*; they fall with a probability that
    is measured, the `risk`. So the chance of a row to get to its next position is (1 - risk)^(drafts at stake so far), and the next draft
    yields, per row, the mean of these chances in tokens.

    What it costs, in policy forwards: 1 for itself and the slope of what the rest of a round costs, a straight line in its length that is
    fitted to the rounds seen. By the rule of renewal processes the round ends where a draft yields less for its cost than rounds do on
    average: that maximises tokens per second.

    The draft length changes the cost of a rollout, not the rollout (`sampling/draw.py`), but for rounding in the last digit. Who needs runs
    that agree to the last bit sets a fixed length.

    Attributes:
        max_length: never draft further.
    """

    max_length: int = 16
    rounds: int = 0
    slope: float = 0.0
    _tokens: float = 0.0  # of a row
    _cost: float = 0.0  # in policy forwards
    _at_stake: float = 2.0  # as if one of two had fallen
    _rejected: float = 1.0
    _line: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)  # sums of 1, K, K^2, cost, K cost

    @property
    def risk(self) -> float:
        """The probability that a draft at stake is rejected."""
        return self._rejected / self._at_stake

    def goes_on(self, num_drafts: int, reach: float) -> bool:
        """Whether a round should draft once more.

        Args:
            num_drafts: of the round so far.
            reach: the chance to get to the next position, mean over rows.
        """
        if num_drafts >= self.max_length:
            return False
        if self.rounds < len(FIRST_LENGTHS):
            return num_drafts < FIRST_LENGTHS[self.rounds]
        return reach * self._cost > self._tokens * (1 + self.slope)

    def observe(
        self,
        length: int,
        tokens: float,
        *,
        num_at_stake: int,
        num_rejected: int,
        policy_seconds: float,
        rest_seconds: float,
    ) -> None:
        """Take in one round.

        Args:
            length: drafts per row.
            tokens: committed per row, accepted or replaced.
            num_at_stake: drafts that the expert could reject, of those that it came to.
            num_rejected: of these.
            policy_seconds: time of `length` policy forwards.
            rest_seconds: time of the rest: of the expert's forward, and of judging and writing down what was drafted.
        """
        cost = rest_seconds * length / policy_seconds
        self.rounds += 1
        self._tokens = MEMORY * self._tokens + tokens
        self._cost = MEMORY * self._cost + length + cost
        self._at_stake = MEMORY * self._at_stake + num_at_stake
        self._rejected = MEMORY * self._rejected + num_rejected
        n, k, kk, c, kc = (LINE_MEMORY * past for past in self._line)
        self._line = n, k, kk, c, kc = n + 1, k + length, kk + length**2, c + cost, kc + length * cost
        if n * kk - k * k > MIN_SPREAD * n * kk:
            self.slope = max(0.0, (n * kc - k * c) / (n * kk - k * k))
