"""Bootstrap intervals against what is known of the mean."""

import pytest
import torch

from trl_selective.functional.intervals import bootstrap_interval


def test_two_problems():
    """Two draws of 0 and 1 have the mean 0, 1/2 or 1 with chances 1/4, 1/2, 1/4: the middle 40 % of draws are 1/2, and the middle 95 % span all."""
    values = torch.tensor([0.0, 1.0])
    assert [end.item() for end in bootstrap_interval(values)] == [0.0, 1.0]
    assert [end.item() for end in bootstrap_interval(values, level=0.4)] == [0.5, 0.5]


def test_many_problems_are_nearly_normal():
    values = torch.randn(400, dtype=torch.float64)
    low, high = bootstrap_interval(values, draws=20_000)
    half = 1.96 * values.std().item() / 20  # standard error: over the root of 400
    assert low.item() == pytest.approx(values.mean().item() - half, abs=0.1 * half)
    assert high.item() == pytest.approx(values.mean().item() + half, abs=0.1 * half)


def test_what_was_measured_of_a_problem_stays_together():
    values = torch.rand(30, 2, 3)
    values[:, 1] = 1 - values[:, 0]
    low, high = bootstrap_interval(values)
    assert low.shape == (2, 3)
    torch.testing.assert_close(low[1], 1 - high[0])  # only if both are of the same draws


def test_one_problem_says_nothing_about_others():
    low, high = bootstrap_interval(torch.tensor([[0.3, 0.7]]))
    assert low.isnan().all()
    assert high.isnan().all()
    assert low.shape == (2,)


def test_global_random_numbers_stay_as_they_are():
    before = torch.random.get_rng_state()
    first = bootstrap_interval(torch.rand(10).sort().values)
    torch.random.set_rng_state(before)
    assert first[0] == bootstrap_interval(torch.rand(10).sort().values)[0]
    state = torch.random.get_rng_state()
    bootstrap_interval(torch.ones(3))
    assert torch.equal(state, torch.random.get_rng_state())
