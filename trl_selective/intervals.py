"""How sure is a mean? Bootstrap intervals: what other problems of the kind, and other seeds, could have given."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DRAWS = 4000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def text(self, scale: float = 1.0, digits: int = 1, sign: str = "") -> str:
        mean, low, high = (f"{scale * value:{sign}.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


def bootstrap(values: np.ndarray) -> Estimate:
    """The mean of `values` (seeds x problems, NaN where a problem has no value) with its bootstrap interval over both axes; NaN if none has a value."""
    weights = _times_drawn(values.shape)
    known = ~np.isnan(values)
    if not known.any():
        return Estimate(np.nan, np.nan, np.nan)
    total = np.einsum("ds,sp,dp->d", weights[0], np.where(known, values, 0.0), weights[1], optimize=True)
    count = np.einsum("ds,sp,dp->d", weights[0], known.astype(float), weights[1], optimize=True)
    low, high = np.percentile(total[count > 0] / count[count > 0], [2.5, 97.5])
    return Estimate(float(np.nanmean(values)), float(low), float(high))


@lru_cache(maxsize=2)
def _times_drawn(shape: tuple[int, int]) -> list[np.ndarray]:
    """How often each draw takes each seed, and each problem. The same for all values of one shape: drawing takes longer than all else."""
    rng = np.random.default_rng(0)
    return [rng.multinomial(size, np.full(size, 1 / size), DRAWS) for size in shape]
