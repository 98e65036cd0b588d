"""Does the policy still find many solutions? Unbiased pass@k, and how much completions differ from one another."""

from collections.abc import Hashable, Sequence, Set
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def pass_at_k(
    num_samples: int | Int[Tensor, "*problems"], num_correct: int | Int[Tensor, "*problems"], k: int
) -> Float[Tensor, "*problems"]:
    """Probability that at least one of k samples is correct, estimated without bias from n >= k samples (arXiv:2107.03374, Eq. 1).

    1 - C(n - c, k) / C(n, k), as the product 1 - prod_{i=n-c+1..n} (1 - k / i), which neither overflows nor loses digits.

    Args:
        num_samples: n, samples drawn per problem.
        num_correct: c, how many of them are correct.
        k: 1 <= k <= n.

    Raises:
        ValueError: if k or num_correct lies outside its range.
    """
    n, c = torch.broadcast_tensors(torch.as_tensor(num_samples), torch.as_tensor(num_correct))
    if k < 1 or (n < k).any():
        raise ValueError(f"pass@k needs 1 <= k <= num_samples, got k = {k} and num_samples = {n.min().item()}.")
    if (c < 0).any() or (c > n).any():
        raise ValueError(f"num_correct must lie in [0, num_samples], got {c.tolist()} of {n.tolist()}.")
    i = torch.arange(1, int(n.max()) + 1, dtype=torch.float64)
    in_product = (i > (n - c).unsqueeze(-1)) & (i <= n.unsqueeze(-1))
    # Where fewer than k are wrong, i = k is among them: its factor is 0, and pass@k is 1.
    factors = torch.where(in_product, 1 - k / i, 1.0)
    return 1 - factors.prod(-1)


def distinct_n(completions: Sequence[Sequence[Hashable]], n: int = 2) -> float:
    """Share of distinct n-grams among all n-grams of all completions (distinct-n, arXiv:1510.03055): 1 if none repeats.

    Args:
        completions: token ids, or words.
        n: length of the n-grams.

    Returns:
        A number in (0, 1], or NaN if no completion has n tokens.
    """
    grams = [gram for completion in completions for gram in n_grams(completion, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def pairwise_overlap(completions: Sequence[Sequence[Hashable]], n: int = 2) -> float:
    """Mean Jaccard overlap of the n-gram sets of all pairs of completions: 0 if no two share an n-gram, 1 if all are alike.

    Completions without an n-gram count as alike with one another. NaN for fewer than two completions.
    """
    sets = [set(n_grams(completion, n)) for completion in completions]
    overlaps = [jaccard(a, b) for a, b in combinations(sets, 2)]
    return sum(overlaps) / len(overlaps) if overlaps else float("nan")


def jaccard(a: Set[Hashable], b: Set[Hashable]) -> float:
    """Shared share of two sets: 1 if they are alike, also if both are empty; 0 if they have nothing in common."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if a or b else 1.0


def n_grams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """All runs of n tokens, in order."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))
