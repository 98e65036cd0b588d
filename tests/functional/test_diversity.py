"""pass@k against all subsets; overlap of n-grams in numbers."""

from itertools import combinations

import pytest
import torch

from trl_selective.functional import distinct_n, jaccard, n_grams, pairwise_overlap, pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
    for c in range(n + 1):
        is_correct = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(combinations(is_correct, k))
            share = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(n, c, k).item() == pytest.approx(share, abs=1e-12)


def test_pass_at_k_of_many_problems_at_once():
    n, c = torch.tensor([4, 8, 8, 3]), torch.tensor([0, 1, 8, 2])
    expected = [pass_at_k(int(a), int(b), 2).item() for a, b in zip(n, c, strict=True)]
    # 0; 2 / 8; 1; 1 - C(1, 2) / C(3, 2) = 1
    assert pass_at_k(n, c, 2).tolist() == expected == [0.0, pytest.approx(0.25), 1.0, 1.0]
    assert pass_at_k(8, torch.tensor([[0, 1], [8, 4]]), 1).tolist() == [
        [0.0, pytest.approx(0.125)],
        [1.0, pytest.approx(0.5)],
    ]


def test_pass_at_k_of_many_samples_neither_overflows_nor_loses_digits():
    # one correct sample of n is among k with probability k / n
    assert pass_at_k(100_000, 1, 700).item() == pytest.approx(0.007, rel=1e-9)


@pytest.mark.parametrize(("n", "k"), [(4, 0), (4, 5), (4, -1)])
def test_pass_at_k_names_a_wrong_k(n, k):
    with pytest.raises(ValueError, match=f"1 <= k <= num_samples, got k = {k} and num_samples = {n}"):
        pass_at_k(n, 1, k)


@pytest.mark.parametrize("c", [-1, 5])
def test_pass_at_k_names_a_wrong_count(c):
    with pytest.raises(ValueError, match=rf"num_correct must lie in \[0, num_samples\], got {c} of 4"):
        pass_at_k(4, c, 2)


def test_one_problem_out_of_range_is_enough():
    for num_correct in ([1, -1], [5, 1]):
        with pytest.raises(ValueError, match=r"num_correct must lie in \[0, num_samples\]"):
            pass_at_k(4, torch.tensor(num_correct), 2)
    with pytest.raises(ValueError, match="got k = 3 and num_samples = 2"):
        pass_at_k(torch.tensor([4, 2]), 1, 3)


def test_distinct_n():
    assert distinct_n([[1, 2, 1, 2]]) == pytest.approx(2 / 3)  # 12, 21, 12
    assert distinct_n([[1, 2, 1, 2]], n=1) == pytest.approx(2 / 4)
    assert distinct_n([[1, 2], [1, 2], [3, 4]]) == pytest.approx(2 / 3)  # also across completions; none spans two
    assert distinct_n([["a", "b"], ["a", "c"]], n=2) == 1.0
    assert distinct_n([[1], []], n=2) != distinct_n([[1], []], n=2)  # NaN


def test_pairwise_overlap():
    assert pairwise_overlap([[1, 2, 3], [1, 2, 3]]) == 1.0
    assert pairwise_overlap([[1, 2, 3], [3, 2, 1]]) == 0.0
    # {12, 23} and {12, 24}: 1 / 3
    assert pairwise_overlap([[1, 2, 3], [1, 2, 4]]) == pytest.approx(1 / 3)
    # pairs: 1/3; {12, 23} and {12}: 1/2; {12, 24} and {12}: 1/2; mean 4/9
    assert pairwise_overlap([[1, 2, 3], [1, 2, 4], [1, 2]]) == pytest.approx(4 / 9)
    assert pairwise_overlap([[1, 2, 1, 2], [1, 2, 1]]) == 1.0  # sets: how often does not matter
    assert pairwise_overlap([[1], []]) == 1.0
    assert pairwise_overlap([[1], [1, 2]]) == 0.0
    assert pairwise_overlap([[1, 2]]) != pairwise_overlap([[1, 2]])  # NaN


def test_jaccard():
    assert jaccard({1, 2, 3}, {2, 3, 4}) == jaccard({2, 3, 4}, {1, 2, 3}) == pytest.approx(2 / 4)
    assert jaccard({1, 2}, {1, 2}) == 1.0
    assert jaccard({1}, {2}) == 0.0
    assert jaccard(set(), {2}) == jaccard({2}, set()) == 0.0
    assert jaccard(set(), set()) == 1.0


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, [(1,), (2,), (1,), (2,)]), (2, [(1, 2), (2, 1), (1, 2)]), (4, [(1, 2, 1, 2)]), (5, [])],
)
def test_n_grams_in_order_and_with_repetitions(n, expected):
    assert n_grams([1, 2, 1, 2], n) == n_grams((1, 2, 1, 2), n) == expected
    assert n_grams([], n) == []
