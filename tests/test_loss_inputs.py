"""What a loss takes from the probabilities of now. Through the loss itself: test_trainer.py, test_injected_training.py, test_numerics.py."""

import math

import torch

from trl_selective.functional.thresholds import EntropyHistogram
from trl_selective.loss_inputs import LossSums, bind_to_policy

MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]])
LOGPS = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -9.0], [-0.5, -1.5, -9.0]])
ENTROPIES = torch.tensor([[0.1, 0.2, 0.3], [1.0, 1.0, 7.0], [2.0, 2.0, 7.0]])


def batch(**fields) -> dict:
    """An on-policy row, a guided one and one that may be injected."""
    guided = torch.tensor([False, True, False])
    return {"completion_mask": MASK, "advantages": torch.tensor([-1.0, 0.5, 2.0]), "is_guided": guided, **fields}


def bind(inputs, logps=LOGPS, entropies=ENTROPIES, **settings) -> LossSums:
    settings = {
        "histogram": None,
        "needs_entropies": False,
        "correction": "none",
        "gamma": 0.1,
        "max_ratio": math.inf,
    } | settings
    return LossSums(*bind_to_policy(inputs, logps, entropies, **settings).tolist())


def injected(**fields) -> dict:
    return batch(is_injected=torch.tensor([False, False, True]), **fields)


def test_entropy_is_that_of_on_policy_tokens():
    histogram = EntropyHistogram(16)
    sums = bind(injected(), histogram=histogram)
    assert abs(sums.mean_entropy - 0.2) < 1e-7  # (0.1 + 0.2 + 0.3) / 3
    assert histogram.counts.sum() == sums.num_on_policy == 3


def test_injected_tokens_have_a_ratio_of_1_and_what_was_sampled_keeps_its_own():
    old = torch.full((3, 3), -4.0)
    inputs = injected(old_per_token_logps=old)
    sums = bind(inputs)
    assert torch.equal(inputs["old_per_token_logps"], torch.cat([old[:2], LOGPS[2:]]))
    assert old.eq(-4.0).all()  # the batch itself may be used again
    assert sums.injected_metrics["guidance/injection/logp"] == -4.0  # before the update, as it was sampled


def test_weights_are_for_injected_tokens_alone():
    inputs = injected()
    sums = bind(inputs, correction="policy_shaping", gamma=0.5)
    p = LOGPS[2, :2].exp()  # of two tokens and padding: pi f'(pi) with f(pi) = pi / (pi + gamma)
    expected = 2.0 * 0.5 * p / (p + 0.5).square()
    torch.testing.assert_close(inputs["advantages"][2, :2], expected)
    assert torch.equal(inputs["advantages"][:2], torch.tensor([[-1.0] * 3, [0.5] * 3]))
    part = expected.double().sum().item()  # with 3 * 1 and 2 * 0.5 it is the whole
    assert abs(sums.injected_metrics["guidance/injection/gradient_share"] - part / (part + 4.0)) < 1e-6


def test_advantages_of_tokens_stay_those_of_tokens():
    advantages = torch.arange(9.0).view(3, 3)
    inputs = injected(advantages=advantages)
    bind(inputs)
    assert torch.equal(inputs["advantages"], advantages)


def test_a_row_that_is_not_finite_is_counted_and_named():
    logps, entropies = LOGPS.clone(), ENTROPIES.clone()
    logps[1, 1], logps[2, 2], entropies[0, 0] = -math.inf, math.nan, math.nan  # the second is padding
    inputs = batch()
    assert bind(inputs, logps, entropies).num_invalid == 1
    assert inputs["is_finite"].tolist() == [True, False, True]
    assert bind(inputs, logps, entropies, needs_entropies=True).num_invalid == 2


def test_means_of_nothing():
    inputs = injected(completion_mask=torch.zeros(3, 3, dtype=torch.int64))
    sums = bind(inputs)
    assert sums.num_invalid == 0
    assert all(math.isnan(value) for value in (sums.mean_entropy, *sums.injected_metrics.values()))


def test_without_injected_rows_the_batch_stays_as_it_is():
    inputs = batch()
    before = dict(inputs)
    assert bind(inputs).num_injected == 0
    assert set(inputs) - set(before) == {"is_finite"}
    assert all(inputs[name] is value for name, value in before.items())
