"""What entropy counts as uncertain? gamma_p, the p-quantile of the policy's token entropies (arXiv:2510.04140, section 3).

A batch of long rollouts has tens of millions of tokens, spread over processes. A histogram of fixed size takes them as they come, adds up
across processes, and yields any quantile to within one bin: no gather of tokens, no sort, no limit on their number. Counts are integers, so
merging is exact in any order.
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NUM_BINS = 8192


@dataclass
class EntropyHistogram:
    """Counts of token entropies in `num_bins` equal bins over [0, log V], the range of an entropy over V tokens.

    Attributes:
        vocab_size: V >= 2.
        num_bins: resolution; a quantile is off by at most `bin_width` = log(V) / num_bins nats (0.0015 for V = 150,000) from
            the entropy of the nearest rank.
        counts: (num_bins,) int64, on the device of the entropies. Sum those of several processes to merge them.

    Example:
        >>> histogram = EntropyHistogram(vocab_size=8)
        >>> histogram.update(torch.linspace(0, 1, 101), mask=torch.ones(101, dtype=torch.bool))
        >>> round(histogram.quantile(0.95), 2)
        0.95
    """

    vocab_size: int
    num_bins: int = NUM_BINS
    counts: Int[Tensor, "bins"] = field(default=None, repr=False)  # type: ignore[assignment]

    def __post_init__(self):
        if self.counts is None:
            self.counts = torch.zeros(self.num_bins, dtype=torch.int64)

    @property
    def bin_width(self) -> float:
        """Width of a bin in nats."""
        return math.log(self.vocab_size) / self.num_bins

    def update(self, entropies: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> None:
        """Count the entropies (nats) that `mask` selects. Nothing is synchronised with the host."""
        bins = (entropies.detach() / self.bin_width).long().clamp(0, self.num_bins - 1)
        self.counts = self.counts.to(entropies.device)
        self.counts.index_add_(0, bins.flatten(), mask.flatten().long())

    def quantile(self, q: float) -> float | None:
        """The q-quantile in nats, linear within its bin; None if nothing was counted.

        Args:
            q: in [0, 1].
        """
        cumulative = self.counts.double().cumsum(0)
        total = cumulative[-1].item()
        if total == 0:
            return None
        target = q * (total - 1) + 0.5  # the value of rank r (from 0) lies in the middle of the r-th count
        index = int(torch.searchsorted(cumulative, target))
        below = cumulative[index - 1].item() if index else 0.0
        return (index + (target - below) / self.counts[index].item()) * self.bin_width
