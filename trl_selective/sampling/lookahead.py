"""How far should the policy draft before the expert is asked? As far as the tokens per second of past rounds suggest."""

from dataclasses import dataclass, field

FIRST_LENGTHS = (4, 2, 8)  # tried in turn, so that a line can be laid through the expert's costs
MEMORY = 0.95  # how much of the past each round keeps


@dataclass
class Lookahead:
    """Chooses the draft length K that yields the most tokens per second, from acceptance and forward costs measured so far.

    A round of K drafts costs K policy forwards and one expert forward of K tokens. With a share `a` of drafts accepted it yields
    1 + a + ... + a^(K-1) tokens: each position that is reached gives one, accepted or replaced. The expert's cost in units of a policy
    forward is a straight line in K, fitted to the rounds seen.

    The draft length changes the cost of a rollout, not the rollout (`sampling/draw.py`), but for rounding in the last digit. Who needs runs
    that agree to the last bit sets a fixed length.

    Attributes:
        max_length: never draft further.
    """

    max_length: int = 16
    rounds: int = 0
    tested: float = 0.0
    accepted: float = 0.0
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # of 1, K, K^2, cost, K cost

    def length(self) -> int:
        """The next draft length, in [1, max_length]."""
        if self.rounds < len(FIRST_LENGTHS):
            return min(FIRST_LENGTHS[self.rounds], self.max_length)
        intercept, slope = self._expert_cost()
        acceptance = self.accepted / self.tested

        def tokens_per_cost(k: int) -> float:
            return sum(acceptance**i for i in range(k)) / (k + intercept + slope * k)

        return max(range(1, self.max_length + 1), key=tokens_per_cost)

    def observe(self, length: int, tested: int, accepted: int, policy_seconds: float, expert_seconds: float) -> None:
        """Take in one round.

        Args:
            length: drafts per row.
            tested: drafts that were reached, summed over rows.
            accepted: how many of those became tokens.
            policy_seconds: time of `length` policy forwards.
            expert_seconds: time of the expert forward.
        """
        self.rounds += 1
        self.tested = MEMORY * self.tested + tested
        self.accepted = MEMORY * self.accepted + accepted
        cost = expert_seconds * length / policy_seconds
        news = (1.0, length, length**2, cost, length * cost)
        self._sums = [MEMORY * past + new for past, new in zip(self._sums, news, strict=True)]

    def _expert_cost(self) -> tuple[float, float]:
        """Intercept and slope of the least-squares line through the expert's costs; both at least 0."""
        n, k, kk, c, kc = self._sums
        spread = n * kk - k * k
        slope = max(0.0, (n * kc - k * c) / spread) if spread > 1e-6 * kk else 0.0
        return max(0.0, (c - slope * k) / n), slope
