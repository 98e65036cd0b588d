"""One uniform number, one token: the source of all randomness in the samplers.

Every token position of every row owns three uniform numbers: for the draft, for its acceptance, for its replacement. What happens at a
position thus depends on the text before it and on its own three numbers, and on nothing else: neither on how far the policy drafts ahead,
nor on which rows are still in the batch. The draft length changes the cost of a rollout, never the rollout.

Everything comes from torch's global generator of the device, which Trainer saves and restores with each checkpoint.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

DRAFT, ACCEPT, REPLACE = range(3)
BELOW_1 = 1 - 2**-53  # the largest uniform in float64
# Of more tokens than this first a block of tokens is drawn, then one of these: a GPU runs a cumulative sum with one processor per row.
MAX_SCAN = 2**15
BLOCK = 512


def position_noise(num_rows: int, num_positions: int, device: torch.device) -> Float[Tensor, "rows positions 3"]:
    """Independent uniforms in [0, 1), in float64 so that rare tokens keep their exact share."""
    return torch.rand(num_rows, num_positions, 3, dtype=torch.float64, device=device)


def inverse_cdf(probs: Float[Tensor, "*batch vocab"], uniform: Float[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """The token whose slice of the cumulative distribution holds `uniform`. Never a token of probability 0.

    `probs` need not sum to 1 exactly. Sums run in float64: in float32, rounding over 150,000 tokens would distort rare ones.
    """
    uniform = uniform.unsqueeze(-1)
    if probs.shape[-1] <= MAX_SCAN:
        cdf = probs.double().cumsum(-1)
        token = torch.searchsorted(cdf, uniform * cdf[..., -1:], right=True)
        return token.squeeze(-1).clamp(max=probs.shape[-1] - 1)
    blocks = pad(probs, (0, -probs.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    mass = blocks.sum(-1, dtype=torch.float64)
    cdf = mass.cumsum(-1)
    block = inverse_cdf(mass, uniform.squeeze(-1)).unsqueeze(-1)
    end, width = cdf.gather(-1, block), mass.gather(-1, block)
    within = ((uniform * cdf[..., -1:] - end + width) / width).clamp(0, BELOW_1)
    token = inverse_cdf(blocks.take_along_dim(block.unsqueeze(-1), -2).squeeze(-2), within.squeeze(-1))
    return block.squeeze(-1) * BLOCK + token
