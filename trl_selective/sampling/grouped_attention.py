"""Attention over a long cache whose keys and values are shared by groups of heads (GQA), without copies of these.

PyTorch's fused kernels take shared heads or a mask, not both; where there is a mask, Transformers repeats keys and values for each head
(its newest versions not for single tokens). On a GPU a third of the time of guided rollouts went into these copies (a 7B model, 32 rows). The
queries of a group may as well be those of one head that has as many more of them: the same products, over the cache as it is. And of a
mask of truth values PyTorch makes one of numbers, in each layer anew: here it is made once for all of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from threading import RLock

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

_LOCK = RLock()  # the table of attention functions is shared by all threads


@contextmanager
def grouped_attention() -> Iterator[None]:
    """Within, models whose attention is `sdpa` do not repeat keys and values, nor what is made of a mask. For one forward."""
    with _LOCK:
        usual = AttentionInterface()["sdpa"]
        AttentionInterface.register("sdpa", partial(_attention, usual, cache(_mask_of_group)))
        try:
            yield
        finally:
            AttentionInterface.register("sdpa", usual)


def _mask_of_group(
    mask: Shaped[Tensor, "rows 1 new columns"], group: int, dtype: torch.dtype
) -> Float[Tensor, "rows 1 queries columns"]:
    """What is added to the scores of the queries of a group of heads: -inf where a mask of truth values is False."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    return mask.repeat(1, 1, group, 1)


def _attention(
    usual: Callable,
    mask_of_group: Callable[[Tensor, int, torch.dtype], Tensor],
    module,
    query: Float[Tensor, "rows heads new size"],
    key: Float[Tensor, "rows shared columns size"],
    value: Float[Tensor, "rows shared columns value_size"],
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options,
) -> tuple[Float[Tensor, "rows new heads value_size"], None]:
    """An attention function of Transformers. What it does not know it leaves to the usual one."""
    group = query.shape[1] // key.shape[1]
    is_known = all(options.get(name) is None for name in ("position_bias", "softcap"))
    if attention_mask is None or attention_mask.shape[1] > 1 or not is_known:
        return usual(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    queries = query.unflatten(1, (-1, group)).flatten(2, 3)
    mask = mask_of_group(attention_mask, group, query.dtype)
    output = scaled_dot_product_attention(queries, key, value, mask, dropout_p=dropout, scale=scaling)
    return output.unflatten(2, (group, -1)).flatten(1, 2).transpose(1, 2).contiguous(), None
