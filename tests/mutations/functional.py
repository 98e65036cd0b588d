"""Faults in the formulas."""

from tests.mutations.mutation import mutations

FUNCTIONAL = [
    *mutations(
        "functional/advantages.py",
        (
            "advantages = rewards - rewards.nanmean(dim=1, keepdim=True)",
            "advantages = rewards + rewards.nanmean(dim=1, keepdim=True)",
            "the sign of the baseline",
        ),
        (
            "advantages = rewards - rewards.nanmean(dim=1, keepdim=True)",
            "advantages = rewards - rewards.nanmean()",
            "one baseline for all groups",
        ),
        ("STD_EPSILON = 1e-4", "STD_EPSILON = 1e-3", "an epsilon that is not TRL's"),
        (
            "(rewards - on_policy_rewards.nanmean(dim=1, keepdim=True)).clamp(min=0)",
            "(rewards - on_policy_rewards.nanmean(dim=1, keepdim=True))",
            "failed guided rows are punished",
        ),
        (
            "on_policy_rewards.nanmean(dim=1, keepdim=True)).clamp",
            "torch.cat([rewards, on_policy_rewards], dim=1).nanmean(dim=1, keepdim=True)).clamp",
            "guided rows move the baseline",
        ),
        ("(coef / reward_range * excess)", "(coef * excess)", "the range of the reward is not applied"),
        ("(coef / reward_range * excess)", "(excess / reward_range)", "alpha is not applied to guided rows"),
        (
            "own = sampled_rewards.masked_fill(is_guided, torch.nan)",
            "own = rewards.masked_fill(is_guided, torch.nan)",
            "injected rows move the baseline",
        ),
        (
            "own = sampled_rewards.masked_fill(is_guided, torch.nan)",
            "own = sampled_rewards",
            "guided rows are in the baseline of mixed groups",
        ),
        ("is_guided | is_injected,", "is_guided,", "injected rows compete as if the policy had drawn them"),
        (
            "still_guided = is_guided & ~is_injected",
            "still_guided = is_guided",
            "an injected row in a guided place stays out of LUFFY's baseline",
        ),
        (
            "torch.where(is_injected, coef * within_group, within_group)",
            "within_group",
            "alpha is not applied to injected rows inside the group",
        ),
        (
            "is_injected.any(dim=1, keepdim=True) & ~still_guided",
            "is_injected.any() & ~still_guided",
            "one injected row changes the baseline of all groups",
        ),
        ("(squared / (count - 1).clamp(min=0))", "(squared / count)", "a biased standard deviation"),
        ("(count - 1).clamp(min=0)", "(count - 1)", "a standard deviation of nothing"),
        (
            "rewards_per_func.isnan().all(dim=1)",
            "rewards_per_func.isnan().any(dim=1)",
            "a row that one function did not score counts as unscored",
        ),
        ("* reward_weights.abs())", "* reward_weights)", "negative weights shrink the span of the reward"),
        (
            "(~rewards_per_func.isnan()).any(dim=1)",
            "(~rewards_per_func.isnan()).all(dim=1)",
            "the span of a function that scored some rows is left out",
        ),
        ("> reward_range / 2", "> 0", "any reward counts as right"),
        ("decision > 0.5", "decision > 0", "half right is right"),
        (
            "torch.where(decision.isnan(), by_total, decision > 0.5)",
            "decision > 0.5",
            "what another function judges is wrong",
        ),
    ),
    *mutations(
        "functional/diversity.py",
        ("(i > (n - c)", "(i >= (n - c)", "one factor too many in pass@k"),
        ("or (n < k).any()", "or (n <= k).any()", "k = n is refused"),
        ("jaccard(a, b) for a, b in combinations(sets, 2)", "jaccard(a, sets[0]) for a in sets", "not all pairs"),
        ("(len(a) + len(b) - shared)", "(len(a) + len(b))", "the shared part counted twice"),
    ),
    *mutations(
        "functional/importance.py",
        ("log_ratio.exp().clamp(max=max_ratio)", "log_ratio.exp().clamp(min=max_ratio)", "min and max swapped"),
        ("ratio <= max_ratio", "ratio < max_ratio", "the bound itself is masked"),
        (
            "torch.where(mask.bool(), log_ratio, 0.0).sum(-1, keepdim=True)",
            "log_ratio.sum(-1, keepdim=True)",
            "padding counts in the ratio of a sequence",
        ),
        (
            "torch.where(mask.bool(), log_ratio, 0.0).sum(-1, keepdim=True)",
            "torch.where(mask.bool(), log_ratio, 0.0).mean(-1, keepdim=True)",
            "the mean in place of the product",
        ),
        ("(probs + gamma).square()", "(probs + gamma)", "the weight of policy shaping is f and not its gradient"),
        ("mask.sum(-1, keepdim=True).clamp(min=1)", "mask.size(-1)", "padding lowers the geometric mean"),
        (
            "logps - behaviour_logps, mask, f",
            "behaviour_logps - logps, mask, f",
            "the ratio of an injected token upside down",
        ),
        ('drop=bound == "mask"', "drop=False", "sequence_mask truncates"),
        (
            "return torch.where(mask.bool(), weight(log_ratio, max_ratio), 1.0)",
            "return torch.where(mask.bool(), weight(log_ratio, max_ratio), 0.0)",
            "on-policy tokens get the weight 0",
        ),
        (
            "weights.sum().square() / (weights.numel()",
            "weights.sum().square() / ((weights > 0).sum()",
            "weights of 0 do not lower the effective sample size",
        ),
    ),
    *mutations(
        "functional/mixed_policy.py",
        (
            "torch.xlogy(probs, probs).sum(-1)",
            "(torch.xlogy(probs, probs) / 0.6931471805599453).sum(-1)",
            "entropy in bits",
        ),
        (
            ".clamp(max=0).neg()",
            ".neg()",
            "the entropy of a certain law may be negative",
        ),
        (
            "max(threshold, torch.finfo(entropy.dtype).tiny)).clamp(max=max_weight)",
            "max(threshold, torch.finfo(entropy.dtype).tiny)).clamp(max=1) * max_weight",
            "the ramp is scaled, not capped",
        ),
        ("max(threshold, torch.finfo(entropy.dtype).tiny)", "threshold", "0 / 0 at threshold 0"),
        ("(entropy >= threshold)", "(entropy > threshold)", "the gate is closed at its threshold"),
        (
            "return (1 - weight) * policy_probs + weight * expert_probs",
            "return weight * policy_probs + (1 - weight) * expert_probs",
            "w and 1 - w swapped in the mixture",
        ),
        (
            "mixed = (1 - weight) * policy_prob + weight * expert_prob",
            "mixed = weight * policy_prob + (1 - weight) * expert_prob",
            "w and 1 - w swapped in the acceptance",
        ),
        (
            "(mixed / policy_prob).clamp(max=1), 1.0)",
            "(mixed / policy_prob).clamp(max=1), 0.0)",
            "what cannot be drafted is rejected",
        ),
        ("(mixed / policy_prob).clamp(max=1)", "(mixed / policy)", "acceptance beyond 1"),
        (
            "(expert_probs - policy_probs).clamp(min=0)",
            "(policy_probs - expert_probs).clamp(min=0)",
            "the residual's sign",
        ),
        ("total > 0, excess / total,", "total > 0, excess,", "the residual is not normalised"),
        ("excess / total, expert_probs)", "excess / total, 0.0)", "no residual where both agree"),
    ),
    *mutations(
        "functional/schedules.py",
        ("end if step >= steps else start", "end if step > steps else start", "linear over 0 steps divides by 0"),
        ("(1 + math.cos(", "(1 - math.cos(", "the cosine rises"),
        ("end if step >= steps else end +", "start if step >= steps else end +", "alpha comes back after its end"),
        ("step >= boundary", "step > boundary", "a schedule starts one step late"),
        ("boundaries[index - 1] if index else 0", "0", "a joined schedule counts from the start of training"),
    ),
    *mutations(
        "functional/thresholds.py",
        ("q * (total - 1)", "(1 - q) * (total - 1)", "the quantile of the wrong side"),
        ("(total - 1) + 0.5", "(total - 1)", "ranks off by half"),
        ("mask.flatten().long()", "torch.ones_like(mask).flatten().long()", "masked tokens are counted"),
        (".clamp(0, self.num_bins - 1)", ".clamp(0, self.num_bins - 2)", "the last bin stays empty"),
        ("math.log(self.vocab_size)", "math.log2(self.vocab_size)", "the range of the histogram in bits"),
        (
            "cumulative[index - 1].item() if index",
            "cumulative[index].item() if index",
            "the wrong place within the bin",
        ),
    ),
]
