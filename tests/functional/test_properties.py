"""Laws of the formulas, over random shapes, types, masks, and distributions from flat to certain."""

import math
from itertools import combinations

import torch
from hypothesis import strategies as st

from tests.properties import for_all
from trl_selective.config import SCHEDULES, SelectiveGuidanceGRPOConfig
from trl_selective.functional import (
    EntropyHistogram,
    acceptance_probability,
    constant_weight,
    distinct_n,
    effective_sample_size,
    entropy,
    guidance_weight,
    guided_advantages,
    guided_importance_weight,
    hard_gate,
    injected_importance_weight,
    jaccard,
    mixed_group_advantages,
    mixed_policy,
    on_policy_advantages,
    pairwise_overlap,
    pass_at_k,
    policy_shaping_weight,
    residual,
)

CORRECTIONS = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
seeds = st.integers(0, 2**31)
shares = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
scalings = st.sampled_from(["group", "batch", "none"])
dtypes = st.sampled_from([torch.float32, torch.float64])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- Mixture ---------------------------------------------------------------------------------------------------------------------------


def two_laws(seed, shape, vocab, sharpness, zeros, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random distributions of policy and expert; each forbids a share of the tokens, never all of them."""
    numbers = generator(seed)
    logits = sharpness * torch.randn(2, *shape, vocab, dtype=dtype, generator=numbers)
    chance = torch.rand(2, *shape, vocab, generator=numbers)
    allowed = (chance >= zeros) | (chance == chance.amax(-1, keepdim=True))
    policy, expert = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    return policy, expert


laws = {
    "seed": seeds,
    "shape": shapes,
    "vocab": st.integers(1, 40),
    "sharpness": st.sampled_from([0.0, 1.0, 10.0, 1e4]),
    "zeros": st.sampled_from([0.0, 0.5, 1.0]),
    "dtype": dtypes,
}


@for_all(**laws, max_weight=shares)
def test_a_draft_accepted_or_replaced_has_the_law_of_the_mixture(
    seed, shape, vocab, sharpness, zeros, dtype, max_weight
):
    policy, expert = two_laws(seed, shape, vocab, sharpness, zeros, dtype)
    weight = max_weight * torch.rand(shape, dtype=dtype, generator=generator(seed))
    exact = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    mixed = mixed_policy(policy, expert, weight)
    assert (mixed >= 0).all()
    torch.testing.assert_close(mixed.sum(-1), torch.ones(shape, dtype=dtype), **exact)

    accept = torch.stack(
        [acceptance_probability(policy, expert, weight, torch.full(shape, y)) for y in range(vocab)], dim=-1
    )
    assert ((accept >= 0) & (accept <= 1)).all()
    is_normal = policy > torch.finfo(dtype).tiny  # below, a probability has hardly any digits
    assert (accept >= 1 - weight.unsqueeze(-1) - exact["atol"])[is_normal].all()
    replaced = residual(policy, expert)
    assert (replaced >= 0).all()
    torch.testing.assert_close(replaced.sum(-1), torch.ones(shape, dtype=dtype), **exact)
    rejected = (policy * (1 - accept)).sum(-1, keepdim=True)
    torch.testing.assert_close(policy * accept + rejected * replaced, mixed, **exact)


@for_all(**{**laws, "dtype": st.just(torch.float64)}, weight=st.floats(0.01, 1))
def test_the_residual_is_the_same_for_every_weight(seed, shape, vocab, sharpness, zeros, dtype, weight):
    policy, expert = two_laws(seed, shape, vocab, sharpness, zeros, dtype)
    excess = (mixed_policy(policy, expert, torch.full(shape, weight, dtype=dtype)) - policy).clamp(min=0)
    total = excess.sum(-1, keepdim=True)
    differs = total > 1e-6  # a difference of what rounds alike is noise
    expected = torch.where(differs, excess / total, residual(policy, expert))
    torch.testing.assert_close(residual(policy, expert), expected, rtol=0, atol=1e-8)


@for_all(**laws, threshold=st.one_of(st.just(0.0), st.floats(0, 12), st.just(math.inf)), max_weight=shares)
def test_entropies_and_weights_stay_in_their_ranges(
    seed, shape, vocab, sharpness, zeros, dtype, threshold, max_weight
):
    policy, _ = two_laws(seed, shape, vocab, sharpness, zeros, dtype)
    nats = entropy(policy)
    assert ((nats >= 0) & (nats <= math.log(vocab) + 1e-5)).all()
    for weighting in (guidance_weight, hard_gate, constant_weight):
        weight = weighting(nats, threshold, max_weight)
        assert weight.shape == nats.shape
        assert ((weight >= 0) & (weight <= torch.tensor(max_weight, dtype=dtype))).all()
    assert (guidance_weight(nats, threshold, max_weight) <= guidance_weight(nats + 1, threshold, max_weight)).all()


# ---- Advantages ------------------------------------------------------------------------------------------------------------------------


def group_rewards(seed, groups, rows, unscored, levels) -> torch.Tensor:
    """Rewards of a few levels, so that groups without variance occur, some of them NaN: single rows, and whole groups."""
    numbers = generator(seed)
    rewards = torch.randint(levels, (groups, rows), generator=numbers).double() / max(levels - 1, 1)
    missing = torch.rand(groups, rows, generator=numbers) < unscored
    missing |= torch.rand(groups, 1, generator=numbers) < unscored / 2
    return rewards.masked_fill(missing, torch.nan)


rewards_of = {
    "seed": seeds,
    "groups": st.integers(0, 5),
    "rows": st.integers(1, 7),
    "unscored": st.sampled_from([0.0, 0.4, 1.0]),
    "levels": st.integers(1, 5),
}
close = {"rtol": 0, "atol": 1e-9}


@for_all(**rewards_of, scaling=scalings, shift=st.floats(-10, 10))
def test_on_policy_advantages_know_no_zero_of_the_reward(seed, groups, rows, unscored, levels, scaling, shift):
    rewards = group_rewards(seed, groups, rows, unscored, levels)
    advantages = on_policy_advantages(rewards, scaling)
    assert advantages.isfinite().all()
    assert (advantages[rewards.isnan()] == 0).all()
    torch.testing.assert_close(advantages.sum(1), torch.zeros(groups, dtype=torch.float64), **close)
    torch.testing.assert_close(on_policy_advantages(rewards + shift, scaling), advantages, **close)
    order = torch.randperm(rows, generator=generator(seed))
    torch.testing.assert_close(on_policy_advantages(rewards[:, order], scaling), advantages[:, order], **close)


@for_all(**rewards_of, coef=shares, shift=st.floats(-10, 10))
def test_guided_advantages_lie_between_0_and_alpha(seed, groups, rows, unscored, levels, coef, shift):
    rewards, own = (group_rewards(seed + i, groups, rows, unscored, levels) for i in range(2))
    advantages = guided_advantages(rewards, own, coef, 1.0)
    assert ((advantages >= 0) & (advantages <= coef)).all()
    torch.testing.assert_close(guided_advantages(rewards + shift, own + shift, coef, 1.0), advantages, **close)
    torch.testing.assert_close(guided_advantages(rewards * 3, own * 3, coef, 3.0), advantages, **close)


@for_all(
    **rewards_of,
    scaling=scalings,
    mode=st.sampled_from(["positive_excess", "group"]),
    coef=shares,
    guided=shares,
    injected=shares,
    shift=st.floats(-10, 10),
)
def test_mixed_groups(seed, groups, rows, unscored, levels, scaling, mode, coef, guided, injected, shift):
    numbers = generator(seed)
    sampled, given = (group_rewards(seed + i, groups, rows, unscored, levels) for i in range(2))
    is_guided, is_injected = (torch.rand(groups, rows, generator=numbers) < share for share in (guided, injected))
    rewards = torch.where(is_injected, given, sampled)

    def advantages(sampled, rewards, is_guided=is_guided, is_injected=is_injected):
        return mixed_group_advantages(
            sampled, rewards, is_guided, is_injected, coef, 1.0, scale_rewards=scaling, injection_advantage=mode
        )

    before = advantages(sampled, rewards)
    assert before.isfinite().all()
    torch.testing.assert_close(advantages(sampled + shift, rewards + shift), before, **close)
    order = torch.randperm(rows, generator=numbers)
    shuffled = advantages(*(values[:, order] for values in (sampled, rewards, is_guided, is_injected)))
    torch.testing.assert_close(shuffled, before[:, order], **close)

    # Whatever guided rollouts earn, the others have the same advantages, to the last bit.
    other = group_rewards(seed + 2, groups, rows, unscored, levels)
    free = is_guided & ~is_injected
    after = advantages(torch.where(is_guided, other, sampled), torch.where(free, other, rewards))
    assert torch.equal(after[~free], before[~free])


# ---- Importance ------------------------------------------------------------------------------------------------------------------------

weighed = {
    "seed": seeds,
    "rows": st.integers(0, 4),
    "seq": st.integers(0, 9),
    "guided": shares,
    "correction": st.sampled_from(CORRECTIONS),
    "max_ratio": st.sampled_from([0.5, 1.0, 2.0, math.inf]),
}


@for_all(**weighed, spread=st.sampled_from([0.0, 1.0, 30.0]))
def test_importance_weights_are_bounded_and_1_where_the_law_is_the_policy(
    seed, rows, seq, guided, correction, max_ratio, spread
):
    numbers = generator(seed)
    log_ratio = spread * torch.randn(rows, seq, dtype=torch.float64, generator=numbers)
    mask = torch.rand(rows, seq, generator=numbers) < guided
    weights = guided_importance_weight(log_ratio, mask, correction, max_ratio)
    assert ((weights >= 0) & (weights <= max(max_ratio, 1))).all()
    assert (weights[~mask.any(1)] == 1).all()
    same = guided_importance_weight(torch.zeros_like(log_ratio), mask, correction, max(max_ratio, 1))
    assert (same == 1).all()
    # What stands beyond the mask, and how far a row is padded, is nobody's business.
    garbage = torch.where(mask, log_ratio, torch.nan)
    padded = torch.nn.functional.pad(garbage, (0, 3), value=torch.inf)
    more = torch.nn.functional.pad(mask, (0, 3), value=False)
    again = guided_importance_weight(padded, more, correction, max_ratio)
    torch.testing.assert_close(again[:, : weights.size(1)], weights, rtol=1e-12, atol=0)  # sums round by their length


@for_all(**laws, cap=st.floats(0, 0.99))
def test_a_cap_on_w_bounds_the_ratio(seed, shape, vocab, sharpness, zeros, dtype, cap):
    policy, expert = two_laws(seed, shape, vocab, sharpness, zeros, dtype)
    mixed = mixed_policy(policy, expert, guidance_weight(entropy(policy), 0.5, cap))
    drawn = mixed > 0
    assert (policy[drawn] <= mixed[drawn] / (1 - cap) * (1 + 1e-5)).all()


@for_all(seed=seeds, rows=st.integers(0, 4), seq=st.integers(1, 9), guided=shares, gamma=st.floats(1e-3, 1))
def test_policy_shaping_is_at_most_a_quarter(seed, rows, seq, guided, gamma):
    numbers = generator(seed)
    log_probs = -30 * torch.rand(rows, seq, dtype=torch.float64, generator=numbers)
    mask = torch.rand(rows, seq, generator=numbers) < guided
    assert (
        (policy_shaping_weight(log_probs, gamma) >= 0) & (policy_shaping_weight(log_probs, gamma) <= 0.2500001)
    ).all()
    for correction in ("policy_shaping", "sequence_policy_shaping"):
        weights = injected_importance_weight(log_probs, None, mask, correction, gamma=gamma).expand(rows, seq)
        assert (weights[mask] <= 0.2500001).all()
        assert (weights[~mask.any(1)] == 1).all()


@for_all(weights=st.lists(st.floats(0, 1e3), min_size=1, max_size=20).filter(lambda ws: max(ws) > 1e-3))
def test_the_effective_sample_size_is_a_share(weights):
    share = effective_sample_size(torch.tensor(weights, dtype=torch.float64)).item()
    assert 1 / len(weights) - 1e-12 <= share <= 1 + 1e-12


# ---- Thresholds and schedules ----------------------------------------------------------------------------------------------------------


@for_all(
    values=st.lists(st.floats(0, 4), min_size=1, max_size=40),
    quantiles=st.lists(shares, min_size=2, max_size=2).map(sorted),
    cut=shares,
    num_bins=st.integers(1, 500),
)
def test_a_quantile_is_off_by_a_bin_and_histograms_merge(values, quantiles, cut, num_bins):
    entropies = torch.tensor(sorted(values), dtype=torch.float64)
    histogram, *parts = (EntropyHistogram(vocab_size=64, num_bins=num_bins) for _ in range(3))
    everything = torch.ones(len(values), dtype=torch.bool)
    first = torch.arange(len(values)) < cut * len(values)
    for one, mask in zip((histogram, *parts), (everything, first, ~first), strict=True):
        one.update(entropies, mask)
    merged = EntropyHistogram(64, num_bins, parts[1].counts + parts[0].counts)
    assert torch.equal(merged.counts, histogram.counts)
    found = [histogram.quantile(q) for q in quantiles]
    assert found[0] <= found[1]
    for q, value in zip(quantiles, found, strict=True):
        rank = q * (len(values) - 1)
        low, high = entropies[math.floor(rank)].item(), entropies[math.ceil(rank)].item()
        assert low - histogram.bin_width * 1.001 <= value <= high + histogram.bin_width * 1.001


@for_all(
    schedule=st.sampled_from(SCHEDULES),
    coef=st.one_of(st.just(0.0), st.floats(1e-6, 10)),
    steps=st.one_of(st.floats(0, 0.999), st.integers(0, 500)),
    max_steps=st.integers(1, 500),
)
def test_alpha_falls_to_0_and_stays_there(schedule, coef, steps, max_steps):
    config = SelectiveGuidanceGRPOConfig("out", bf16=False)
    config.guidance_schedule, config.guidance_coef, config.guidance_steps = schedule, coef, steps
    alpha = config.guidance_coef_schedule(max_steps)
    end = round(steps * max_steps) if steps < 1 else steps
    values = [alpha(step) for step in range(end + 3)]
    assert values == sorted(values, reverse=True)
    assert set(values[end:]) == {0.0}
    assert all(0 <= value <= coef for value in values)
    assert not end or values[0] == coef


# ---- Diversity -------------------------------------------------------------------------------------------------------------------------


@for_all(n=st.integers(1, 8), correct=shares)
def test_pass_at_k_is_the_share_of_subsets_and_rises_with_k(n, correct):
    c = round(correct * n)
    values = [pass_at_k(n, c, k).item() for k in range(1, n + 1)]
    is_correct = [True] * c + [False] * (n - c)
    for k, value in enumerate(values, start=1):
        subsets = list(combinations(is_correct, k))
        assert abs(value - sum(map(any, subsets)) / len(subsets)) < 1e-12
    assert values == sorted(values)
    if c < n:
        assert all(pass_at_k(n, c + 1, k).item() >= value for k, value in enumerate(values, start=1))


@for_all(n=st.integers(1, 10**6), correct=shares, ks=st.lists(st.integers(1, 1000), min_size=2, max_size=2))
def test_pass_at_k_of_many_samples(n, correct, ks):
    c, ks = round(correct * n), sorted(min(k, n) for k in ks)
    first, second = (pass_at_k(n, c, k).item() for k in ks)
    assert 0 <= first <= second + 1e-12 <= 1 + 2e-12


@for_all(texts=st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=5), n=st.integers(1, 3))
def test_overlaps_are_shares(texts, n):
    for value in (distinct_n(texts, n), pairwise_overlap(texts, n)):
        assert math.isnan(value) or 0 <= value <= 1
    assert pairwise_overlap(texts, n) == pairwise_overlap(texts[::-1], n) or len(texts) != 2
    for first, second in combinations(map(set, texts), 2):
        assert jaccard(first, second) == jaccard(second, first)
        assert (jaccard(first, second) == 1) == (first == second)
