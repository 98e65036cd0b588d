"""One uniform number, one token: the source of all randomness in the samplers.

Every token position of every row owns three uniform numbers: for the draft, for its acceptance, for its replacement. What happens at a
position thus depends on the text before it and on its own three numbers, and on nothing else: neither on how far the policy drafts ahead,
nor on which rows are still in the batch. The draft length changes the cost of a rollout, never the rollout.

Everything comes from torch's global generator of the device, which Trainer saves and restores with each checkpoint.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

DRAFT, ACCEPT, REPLACE = range(3)


def position_noise(num_rows: int, num_positions: int, device: torch.device) -> Float[Tensor, "rows positions 3"]:
    """Independent uniforms in [0, 1), in float64 so that rare tokens keep their exact share."""
    return torch.rand(num_rows, num_positions, 3, dtype=torch.float64, device=device)


def inverse_cdf(probs: Float[Tensor, "*batch vocab"], uniform: Float[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """The token whose slice of the cumulative distribution holds `uniform`. Never a token of probability 0.

    `probs` need not sum to 1 exactly. The sum runs in float64: in float32, rounding over 150,000 tokens would distort rare ones.
    """
    cdf = probs.double().cumsum(-1)
    target = uniform.unsqueeze(-1) * cdf[..., -1:]
    return torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)
