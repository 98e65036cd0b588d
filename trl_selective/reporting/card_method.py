"""What a model card says of the method: its name, its equations with their sources, and the settings that are not the defaults.

All of it follows from the settings. Nothing that names a place on the machine, nor how the expert was loaded, is among them.
"""

import math
from typing import Any

from trl_selective.config import DEFAULTS, GUIDANCE_FIELDS, SelectiveGuidanceGRPOConfig
from trl_selective.presets import PRESETS
from trl_selective.reporting.markdown import table
from trl_selective.reporting.papers import LUFFY, MENTOR

SELECTED = "selected expert completions"
PRIVATE = {
    "expert_model_name_or_path",
    "expert_model_revision",
    "expert_model_init_kwargs",
    "expert_model_server_url",
}

WEIGHTS = {
    "entropy": "`w = min({cap}, H / gamma)`",
    "hard_gate": "`w = {cap}` where `H >= gamma`, else 0",
    "constant": "`w = {cap}`",
}
SAMPLERS = {
    "SpeculativeSampler": ("the policy drafts, the expert accepts or redraws", "MENTOR, Eq. 7-8"),
    "RemoteCoinSampler": (
        "a coin of weight `w` decides whether the expert's server draws the token: the same law",
        "trl-selective",
    ),
    "VllmCoinSampler": (
        "vLLM draws the policy's tokens, and a coin of weight `w` decides where the expert draws one: the same law",
        "trl-selective",
    ),
    "CoinSampler": ("a coin of weight `w` decides who draws the token: the same law", "trl-selective"),
    "StepwiseSampler": ("both models are asked for every token", "MENTOR, Eq. 6"),
}
ADVANTAGES = {
    "group": "`(R - mean) / std`, `mean` and `std` over the {rows} of its group",
    "batch": "`(R - mean) / std`, `mean` over the {rows} of its group, `std` over those of the batch",
    "none": "`R - mean`, `mean` over the {rows} of its group",
}
GUIDED_CORRECTIONS = {
    "none": "1, as if the policy had drawn it",
    "token_truncate": "`min(r, {cap})`, `r = policy / mixture`",
    "token_mask": "`r = policy / mixture`, 0 where `r > {cap}`",
    "sequence_truncate": "`min(r, {cap})`, `r` the product of `policy / mixture` over the completion",
    "sequence_mask": "`r`, the product of `policy / mixture` over the completion, 0 where `r > {cap}`",
}
INJECTED_CORRECTIONS = {
    "policy_shaping": ("`f(p) = p / (p + {gamma})`, `p` the policy's probability of the token", "LUFFY"),
    "sequence_policy_shaping": (
        "`f(p) = p / (p + {gamma})`, `p` the geometric mean of the policy's token probabilities",
        "trl-selective, after LUFFY",
    ),
    "truncated": ("`min(policy / expert, {cap}) log policy`, per token", "trl-selective"),
    "sequence_truncated": ("`min(r, {cap}) log policy`, `r` the product of `policy / expert`", "trl-selective"),
    "none": ("`log policy`", "trl-selective"),
}


def is_luffy(args: SelectiveGuidanceGRPOConfig) -> bool:
    """Whether the settings are LUFFY's, under whatever preset."""
    return not args.num_guided_generations and all(
        getattr(args, name) == value for name, value in PRESETS["luffy"].items()
    )


def method(args: SelectiveGuidanceGRPOConfig) -> tuple[str, dict[str, str]]:
    """The name of the method, and the paper that introduced it: empty where none did. Some guidance must be on."""
    if args.num_guided_generations:
        return f"MENTOR with {SELECTED}" if args.num_injected_completions else "MENTOR", MENTOR
    return ("LUFFY", LUFFY) if is_luffy(args) else (f"GRPO with {SELECTED}", {})


def cited_papers(args: SelectiveGuidanceGRPOConfig) -> dict[str, dict[str, str]]:
    """The papers behind what was used, by the name of their method."""
    is_excess = args.num_injected_completions and args.injection_advantage == "positive_excess"
    papers = {"MENTOR": MENTOR} if args.num_guided_generations or is_excess else {}
    return papers | ({"LUFFY": LUFFY} if args.num_injected_completions else {})


def equations(
    args: SelectiveGuidanceGRPOConfig, sampler: str | None, trigger: str | None, selector: str | None
) -> str:
    """What was computed, and where that is written, as a table.

    Args:
        args: the settings, some guidance among them.
        sampler: class that draws guided rollouts; None without any.
        trigger, selector: names of what chooses groups and completions; None without injection.
    """
    rows = guided_equations(args, sampler) if args.num_guided_generations else []
    if args.num_injected_completions:
        rows += injected_equations(args, trigger, selector)
    strength = ("`alpha`", fall(args.guidance_schedule, args.guidance_coef, args.guidance_steps), "")
    return table(["what", "how", "source"], [*rows, on_policy_advantage(args), strength])


def on_policy_advantage(args: SelectiveGuidanceGRPOConfig) -> tuple[str, str, str]:
    rows, source = "on-policy rollouts", "MENTOR, Eq. 10" if args.scale_rewards == "group" else "TRL, `scale_rewards`"
    if args.num_injected_completions and args.injection_advantage == "group":
        rows, source = "on-policy rollouts and injected completions", "LUFFY"
    return "advantage of on-policy rollouts", ADVANTAGES[args.scale_rewards].format(rows=rows), source


def guided_equations(args: SelectiveGuidanceGRPOConfig, sampler: str) -> list[tuple[str, str, str]]:
    weight = WEIGHTS[args.guidance_weighting].format(cap=f"{args.guidance_weight_max:g}")
    if args.guidance_weighting != "constant":
        weight += (
            f", `H` the policy's entropy of the token, `gamma` the {args.entropy_quantile:g} quantile of `H` over the on-policy tokens of the "
            "previous batch"
        )
    policy = "policy" if args.mixture_policy == "current" else "initial policy"
    correction = GUIDED_CORRECTIONS[args.guided_importance_correction].format(cap=f"{args.importance_ratio_max:g}")
    is_paper = args.guided_importance_correction == "none"
    return [
        ("law of a guided token", f"`(1 - w) * {policy} + w * expert`", "MENTOR, Eq. 6"),
        ("share of the expert", weight, "MENTOR, Eq. 6" if args.guidance_weighting == "entropy" else "trl-selective"),
        ("sampler", f"`{sampler}`: {SAMPLERS[sampler][0]}", SAMPLERS[sampler][1]),
        ("advantage of guided rollouts", "`alpha * max(R - mean, 0) / R_range`", "MENTOR, Eq. 11"),
        ("importance weight of a guided token", correction, "MENTOR, Eq. 9" if is_paper else "trl-selective"),
    ]


def injected_equations(args: SelectiveGuidanceGRPOConfig, trigger: str, selector: str) -> list[tuple[str, str, str]]:
    objective, source = INJECTED_CORRECTIONS[args.injection_correction]
    objective = objective.format(gamma=f"{args.shaping_gamma:g}", cap=f"{args.importance_ratio_max:g}")
    place = {"worst": "rollout with the lowest reward", "last": "last rollout"}[args.injection_replaces]
    advantage = ("`alpha * max(R - mean, 0) / R_range`; what is not better than `mean` stays out", "MENTOR, Eq. 11")
    if args.injection_advantage == "group":
        advantage = ("`alpha` times that of an on-policy rollout with its reward", "LUFFY")
    choice = "LUFFY" if is_luffy(args) else "trl-selective"
    return [
        ("groups that get an expert completion", f"trigger `{trigger}`", choice),
        ("which completion", f"selector `{selector}`, in place of the {place}", choice),
        ("advantage of injected completions", *advantage),
        ("objective of an injected token, times its advantage", objective, source),
    ]


def fall(schedule: str, start: float, steps: float) -> str:
    """A schedule in words."""
    if math.isinf(steps):
        return f"{start:g} throughout"
    span = f"{100 * steps:g} % of all steps" if steps <= 1 else f"{steps:g} steps"
    how = f"{start:g} for {span}" if schedule == "constant" else f"{schedule} from {start:g} to 0 over {span}"
    return f"{how}; then nothing is guided any more, and training is plain GRPO"


def settings(args: SelectiveGuidanceGRPOConfig) -> str:
    """The guidance settings that differ from the defaults, as a table, and what the preset had to do with them."""
    in_order = [name for name in type(args).__dataclass_fields__ if name in GUIDANCE_FIELDS - PRIVATE]
    changed = [name for name in in_order if getattr(args, name) != DEFAULTS.get(name)]
    rows = [(f"`{name}`", code(getattr(args, name)), code(DEFAULTS.get(name))) for name in changed]
    return f"{preset_in_words(args)}\n\n" + table(["setting", "value", "default"], rows)


def preset_in_words(args: SelectiveGuidanceGRPOConfig) -> str:
    if args.preset is None:
        return "No preset. Settings that differ from the defaults:"
    changed = [f"`{name}`" for name, value in PRESETS[args.preset].items() if getattr(args, name) != value]
    but = f", but for {', '.join(changed)}" if changed else ""
    return f"Preset `{args.preset}`{but}. Settings that differ from the defaults:"


def code(value: Any) -> str:
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
