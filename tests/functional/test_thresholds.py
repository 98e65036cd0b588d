"""A quantile of entropies without holding them: never further from the true one than a bin."""

import doctest
import math

import pytest
import torch

from trl_selective.functional import EntropyHistogram, thresholds

QUANTILES = [0.0, 0.01, 0.25, 0.5, 0.8, 0.95, 0.999, 1.0]


def all_of(values: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def histogram_of(values: torch.Tensor, vocab_size: int = 50, **kwargs) -> EntropyHistogram:
    histogram = EntropyHistogram(vocab_size, **kwargs)
    histogram.update(values, all_of(values))
    return histogram


@pytest.mark.parametrize("num_bins", [100, 8192])
@pytest.mark.parametrize(
    "shape",
    [
        lambda n: math.log(50) * torch.rand(n),
        lambda n: torch.rand(n).pow(6),  # most tokens certain, as a language model's
        lambda n: torch.where(torch.rand(n) < 0.9, 0.0, 2.5),  # two heaps
        lambda n: torch.full((n,), 1.234),
    ],
    ids=["uniform", "skewed", "two_heaps", "one_value"],
)
@pytest.mark.parametrize("num", [1, 2, 7, 10_000])
def test_a_quantile_lies_within_one_bin_of_the_nearest_rank(shape, num, num_bins):
    values = shape(num)
    histogram = histogram_of(values, num_bins=num_bins)
    assert histogram.bin_width == pytest.approx(math.log(50) / num_bins)
    ranks = values.double().sort().values
    for q in QUANTILES:
        if (q * (num - 1)) % 1 == 0.5:
            continue  # two ranks are equally near
        nearest = torch.quantile(values.double(), q, interpolation="nearest").item()
        assert nearest == ranks[round(q * (num - 1))]
        assert histogram.quantile(q) == pytest.approx(nearest, abs=histogram.bin_width * 1.001)


def test_worked_numbers():
    histogram = EntropyHistogram(vocab_size=16, num_bins=4)  # bins of log(16) / 4 = log 2
    values = torch.tensor([0.1, 0.2, 0.8, 2.5])  # bins 0, 0, 1, 3
    histogram.update(values, all_of(values))
    assert histogram.counts.tolist() == [2, 1, 0, 1]
    # q = 0: half a count into bin 0 of two: 1/4 of it. q = 1: half of the single count of bin 3. q = 2/3: rank 2, the middle of bin 1
    assert histogram.quantile(0.0) == pytest.approx(0.25 * math.log(2))
    assert histogram.quantile(1.0) == pytest.approx(3.5 * math.log(2))
    assert histogram.quantile(2 / 3) == pytest.approx(1.5 * math.log(2))


def test_counts_of_halves_add_up_to_the_whole():
    values = 3 * torch.rand(1001)
    whole = histogram_of(values)
    halves = histogram_of(values[:400]), histogram_of(values[400:])
    merged = EntropyHistogram(50, counts=halves[0].counts + halves[1].counts)
    assert torch.equal(merged.counts, whole.counts)
    assert [merged.quantile(q) for q in QUANTILES] == [whole.quantile(q) for q in QUANTILES]
    in_turn = histogram_of(values[:400])
    in_turn.update(values[400:], all_of(values[400:]))
    assert torch.equal(in_turn.counts, whole.counts)


def test_nothing_counted_has_no_quantile():
    histogram = EntropyHistogram(50)
    assert histogram.quantile(0.95) is None
    histogram.update(torch.rand(4, 5), torch.zeros(4, 5, dtype=torch.bool))
    assert histogram.quantile(0.95) is None
    histogram.update(torch.rand(0), torch.ones(0, dtype=torch.bool))
    assert histogram.quantile(0.95) is None


def test_masked_tokens_are_not_counted():
    values = 3 * torch.rand(6, 70)
    mask = torch.rand(6, 70) < 0.5
    histogram = EntropyHistogram(50)
    histogram.update(values.masked_fill(~mask, 3.9), mask)
    assert torch.equal(histogram.counts, histogram_of(values[mask]).counts)
    assert histogram.counts.sum() == mask.sum()


def test_the_largest_entropy_and_rounding_beyond_it_fall_into_the_last_bin():
    histogram = histogram_of(torch.tensor([math.log(50), math.log(50) + 1e-4, -1e-7]))
    assert histogram.counts[-1] == 2
    assert histogram.counts[0] == 1


def test_no_gradient_is_kept():
    entropies = torch.rand(3, requires_grad=True)
    histogram = histogram_of(entropies * 2)
    assert not histogram.counts.requires_grad


def test_twenty_million_tokens():
    """torch.quantile ends at 16 million."""
    chunk = 3 * torch.rand(1_000_000).pow(3)
    histogram = EntropyHistogram(50)
    for _ in range(20):
        histogram.update(chunk, all_of(chunk))
    assert histogram.counts.sum() == 20_000_000
    # Each value 20 times: the nearest rank is that of a single chunk, or its neighbour.
    nearest = torch.quantile(chunk, 0.95, interpolation="nearest").item()
    assert histogram.quantile(0.95) == pytest.approx(nearest, abs=histogram.bin_width * 1.1)


def test_examples_run():
    assert doctest.testmod(thresholds) == doctest.TestResults(failed=0, attempted=3)
