"""The coin in an engine, without any engine: what is forced, with what probability, and what a request carries."""

import math

import pytest
import torch
from scipy.stats import chisquare, kstest

from tests.sampling.reference import entropy_of
from trl_selective.engines.coin import COIN, EXPERT, POLICY, Coin, position_seeds, uniforms_of

NUM = 20_000


def position_uniforms(*numbers):
    return uniforms_of(position_seeds(*numbers))


def coin(**changes) -> Coin:
    settings = {"weighting": "entropy", "threshold": 2.0, "max_weight": 1.0, "vocab_size": 6, "sentinel": 6}
    return Coin(**{**settings, **changes})


def flipped(coin, logits, temperature=1.0, seed=5):
    """Many rows with these logits, each at another position."""
    positions = torch.arange(NUM)
    return coin.flip(logits.expand(NUM, -1), temperature, torch.full((NUM,), seed), positions)


LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.5, 1.0, 4.0, 9.0])  # the head has 8 ids, 6 of them are tokens


@pytest.mark.parametrize(
    ("changes", "temperature", "ids"),
    [
        ({}, 1.0, range(6)),
        ({"threshold": 2.5}, 0.7, range(6)),
        ({"max_weight": 0.3}, 1.0, range(6)),
        ({"sentinel": 2}, 1.0, [0, 1, 3, 4, 5]),  # then it is none of the law
        ({"weighting": "constant", "max_weight": 0.25}, 1.3, range(6)),
        ({"weighting": "hard_gate", "threshold": 1.0, "max_weight": 0.9}, 1.0, range(6)),
    ],
)
def test_heads_has_probability_w_and_tails_leaves_the_policy(changes, temperature, ids):
    law = coin(**changes)
    probs = (LOGITS[list(ids)].double() / temperature).softmax(-1)
    entropy = entropy_of(probs).item()
    weight = {
        "entropy": min(law.max_weight, entropy / law.threshold),
        "hard_gate": law.max_weight * (entropy >= law.threshold),
        "constant": law.max_weight,
    }[law.weighting]
    out = flipped(law, LOGITS, temperature)
    is_heads = out[:, law.sentinel] == 0
    assert 0.05 < weight < 0.95
    assert abs(is_heads.sum().item() - NUM * weight) < 4 * math.sqrt(NUM * weight * (1 - weight))
    assert (out[is_heads].softmax(-1)[:, law.sentinel] == 1).all()
    expected = torch.zeros(8, dtype=torch.float64)
    expected[list(ids)] = probs
    tails = (out[~is_heads].double() / temperature).softmax(-1)
    torch.testing.assert_close(tails, expected.expand_as(tails), rtol=1e-6, atol=1e-9)


def test_where_the_policy_is_certain_the_expert_is_never_asked():
    out = flipped(coin(threshold=0.0), torch.tensor([0.0] + [-torch.inf] * 7))
    assert (out.argmax(-1) == 0).all()


def test_a_law_that_is_not_finite_forces_nothing():
    """It is recorded as what it is, by the forward that records the policy's laws."""
    out = flipped(coin(), torch.full((8,), torch.nan))
    assert not (out[:, 6] == 0).any()


def test_numbers_are_uniform_and_independent_of_row_position_and_purpose():
    positions = torch.arange(NUM)
    row = position_uniforms(torch.full((NUM,), 7), positions, COIN)
    others = [
        position_uniforms(torch.full((NUM,), 8), positions, COIN),
        position_uniforms(torch.full((NUM,), 7), positions + 1, COIN),
        position_uniforms(torch.full((NUM,), 7), positions, EXPERT),
    ]
    assert row.min() >= 0
    assert row.max() < 1
    assert kstest(row, "uniform").pvalue > 1e-3
    for other in others:
        cells = (8 * row).long() * 8 + (8 * other).long()
        assert chisquare(torch.bincount(cells, minlength=64)).pvalue > 1e-3
    across = position_uniforms(torch.arange(NUM), torch.full((NUM,), 3), COIN)  # seeds in a row
    assert kstest(across, "uniform").pvalue > 1e-3
    assert torch.equal(row[5:6], position_uniforms(torch.tensor([7]), torch.tensor([5]), COIN))
    seeds = position_seeds(torch.full((NUM,), 2**62 - 1), positions, COIN)
    assert seeds.min() >= 0
    assert len(seeds.unique()) == NUM


def test_no_two_tokens_and_no_two_purposes_share_a_number():
    positions, row = torch.arange(1000), torch.full((1000,), 7)
    numbers = torch.cat([position_seeds(row, positions, purpose) for purpose in (COIN, POLICY, EXPERT)])
    assert len(numbers.unique()) == 3000


def test_a_request_carries_its_coin():
    assert Coin.from_arguments({**coin().arguments(12), "other": 1}) == (coin(), 12)
    assert Coin.from_arguments(coin(threshold=2).arguments(12)) == (coin(), 12)  # JSON may say 2
    assert Coin.from_arguments({"other": 1}) is None
    assert Coin.from_arguments(None) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coin_seed": None}, r"coin_seed must be of type int, got None\."),
        ({"coin_threshold": "2"}, r"coin_threshold must be of type float, got '2'\."),
        ({"coin_sentinel": True}, r"coin_sentinel must be of type int, got True\."),
        ({"coin_shade": 1}, r"A guided request carries \['coin_max_weight', .*\], got .*'coin_shade'"),
        ({"coin_weighting": "soft"}, r"coin_weighting must be one of .*, got 'soft'"),
        ({"coin_threshold": -1.0}, r"Expected coin_threshold >= 0, .* got Coin\(weighting='entropy', threshold=-1\.0"),
        ({"coin_threshold": math.nan}, r"Expected coin_threshold >= 0"),
        ({"coin_max_weight": 1.5}, r"coin_max_weight in \[0, 1\]"),
    ],
)
def test_half_a_coin_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Coin.from_arguments({**coin().arguments(12), **changes})


def test_a_missing_part_is_named():
    with pytest.raises(ValueError, match=r"A guided request carries .*'coin_weighting'\], got \['coin_weighting'\]"):
        Coin.from_arguments({"coin_weighting": "entropy"})
