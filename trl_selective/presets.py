"""Named settings from the literature. A preset fills the guidance fields that the user left unset, and nothing else."""

# arXiv:2510.04140. Section 3: the weight min(1, H / gamma_p), p = 0.95, no correction for having sampled from the mixture. Section 4:
# four mixed rollouts per prompt, alpha from 1 to 0 by a cosine over 120 of 200 steps.
MENTOR = {
    "num_guided_generations": 4,
    "guidance_weighting": "entropy",
    "entropy_quantile": 0.95,
    "guidance_coef": 1.0,
    "guidance_schedule": "cosine",
    "guidance_steps": 0.6,
    "guided_importance_correction": "none",
}

PRESETS = {
    "mentor": MENTOR,
    # Ours: w <= 0.9 bounds pi_theta / pi_mix by 10, so that the importance weight of a token needs no truncation.
    "mentor_corrected": MENTOR | {"guided_importance_correction": "token_truncate", "guidance_weight_max": 0.9},
    # What the paper's released code does and its text does not say: the policy half of the mixture is the initial checkpoint, the
    # threshold starts at 999 and is floored at 1.5 nats, the first token comes from the expert, rewards are not divided by their range.
    "mentor_as_released": MENTOR
    | {
        "mixture_policy": "initial",
        "entropy_threshold_init": 999.0,
        "entropy_threshold_floor": 1.5,
        "first_token_from_expert": True,
        "reward_range": 1.0,
    },
    # LUFFY (arXiv:2504.14945): one expert trajectory in each group of 8, policy shaping with gamma = 0.1, inside the group's baseline, for
    # the whole of training. Its loss is GRPO's without division by lengths and standard deviations (see BESIDE).
    "luffy": {
        "num_injected_completions": 1,
        "injection_trigger": "always",
        "injection_selector": "first",
        "injection_replaces": "last",
        "injection_advantage": "group",
        "injection_correction": "policy_shaping",
        "shaping_gamma": 0.1,
        "guidance_coef": 1.0,
        "guidance_schedule": "constant",
        "guidance_steps": float("inf"),
    },
    # Ours: an expert completion only where the group found nothing right, the one with the best reward, counted by what it is better than the
    # group, less and less. On the quickstart `reward_gain` did best of eight selectors (recipes/quickstart/README.md).
    "selective": {
        "num_injected_completions": 1,
        "injection_trigger": "group_failed",
        "injection_selector": "reward_gain",
        "injection_replaces": "worst",
        "injection_advantage": "positive_excess",
        "injection_correction": "policy_shaping",
        "shaping_gamma": 0.1,
        "guidance_coef": 1.0,
        "guidance_schedule": "cosine",
        "guidance_steps": 0.6,
    },
}

# What their papers have beside these fields, in TRL's own, which are never unset.
BESIDE: dict[str, dict[str, object]] = {
    "mentor": {"num_generations": 12},
    "mentor_as_released": {"num_generations": 12},
    "luffy": {"loss_type": "dr_grpo", "scale_rewards": "none"},
}
