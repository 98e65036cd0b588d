"""How sure is a mean over problems? Bootstrap intervals: what other problems of the same kind could have given."""

import torch
from jaxtyping import Float
from torch import Tensor


def bootstrap_interval(
    values: Float[Tensor, "problems *rest"], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
    """Lower and upper end of the percentile interval of the mean over problems, which are drawn anew with replacement.

    All entries of one problem are drawn together. One problem says nothing about others: the interval is NaN.

    Args:
        values: what was measured of each problem.
        level: share of the draws between the two ends.
        draws, seed: how many draws, and of which random numbers; the global ones stay as they are.
    """
    num, flat = len(values), values.double().reshape(len(values), -1)
    if num == 1:
        nothing = torch.full(values.shape[1:], torch.nan)
        return nothing, nothing.clone()
    drawn = torch.randint(num, (draws, num), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(draws, num, dtype=torch.float64).scatter_add_(
        1, drawn, torch.full(drawn.shape, 1 / num).double()
    )
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(weights @ flat, tails, dim=0).float()
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])
