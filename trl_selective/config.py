"""The settings of guidance, beside all of GRPOConfig's. Values and combinations that cannot work fail here, before any model is loaded."""

import math
import sys
import warnings
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from trl import GRPOConfig

from trl_selective.functional.schedules import Schedule, constant, cosine, join, linear
from trl_selective.presets import PRESETS
from trl_selective.sampling import WEIGHTINGS

SCHEDULES = ("cosine", "linear", "constant")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
SAMPLERS = ("auto", "speculative", "stepwise")
MIXTURE_POLICIES = ("current", "initial")

# Every guidance field is None until it is set by the user, then by the preset, then from here. A field that stays None says so in its help.
DEFAULTS: dict[str, Any] = {
    "num_guided_generations": 0,
    "guidance_weighting": "entropy",
    "entropy_quantile": 0.95,
    "entropy_threshold_floor": 0.0,
    "guidance_weight_max": 1.0,
    "guidance_coef": 1.0,
    "guidance_schedule": "cosine",
    "guidance_steps": 0.6,
    "guided_importance_correction": "none",
    "importance_ratio_max": float("inf"),
    "mixture_policy": "current",
    "first_token_from_expert": False,
    "guided_sampler": "auto",
    "max_draft_length": 16,
}


# The numbers among them, by their bounds.
AT_LEAST = {
    "num_guided_generations": 0,
    "guidance_coef": 0,
    "guidance_steps": 0,
    "entropy_threshold_floor": 0,
    "entropy_threshold_init": 0,
    "draft_length": 1,
    "max_draft_length": 1,
}
POSITIVE = ("reward_range", "importance_ratio_max")
WHOLE = ("num_guided_generations", "draft_length", "max_draft_length")
MAY_BE_INFINITE = ("guidance_steps", "importance_ratio_max")


def _option(help: str, **kwargs) -> Any:
    return field(default=None, metadata={"help": help, **kwargs})


@dataclass
class SelectiveGuidanceGRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`SelectiveGuidanceGRPOTrainer`].

    This class includes only the parameters of selective guidance. For all others see [`~trl.GRPOConfig`]. With the defaults there is no
    guidance, and training is GRPO.

    Parameters:
        > Parameters that control who guides, and how much

        preset (`str`, *optional*):
            Fills the parameters below that are left unset: `"mentor"` (arXiv:2510.04140), `"mentor_corrected"` (with importance weights
            bounded by `guidance_weight_max`), or `"mentor_as_released"` (as its published code differs from the paper).
        num_guided_generations (`int`, *optional*, defaults to `0`):
            How many of the `num_generations` rollouts of each prompt are drawn from the mixture of policy and expert. They are the last
            ones of the group. At least 2 must stay on-policy.
        expert_model_name_or_path (`str`, *optional*):
            Hub id or local path of the expert, used when the trainer's argument `expert_model` is not given.
        expert_model_revision (`str`, *optional*):
            Revision of the expert on the Hub.
        expert_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `AutoModelForCausalLM.from_pretrained` of the expert. `dtype` defaults to bfloat16 on accelerators and to
            float32 on CPUs.

        > Parameters that control where the expert steps in (Eq. 6)

        guidance_weighting (`str`, *optional*, defaults to `"entropy"`):
            How the expert's share w of the mixture follows from the policy's entropy H: `"entropy"`, w = min(1, H / threshold);
            `"hard_gate"`, w = 1 where H >= threshold; `"constant"`, w = `guidance_weight_max` everywhere.
        guidance_weight_max (`float`, *optional*, defaults to `1.0`):
            Upper bound of w. Below 1 it bounds the importance ratio by 1 / (1 - guidance_weight_max).
        entropy_quantile (`float`, *optional*, defaults to `0.95`):
            The threshold is this quantile of the entropies of the on-policy tokens of the previous batch.
        entropy_threshold_init (`float`, *optional*):
            Threshold in nats before the first measurement. When unset, the first batch is not guided.
        entropy_threshold_floor (`float`, *optional*, defaults to `0.0`):
            Lower bound of the threshold in nats.
        mixture_policy (`str`, *optional*, defaults to `"current"`):
            The policy half of the mixture: `"current"`, or a frozen copy of the `"initial"` policy, as in the paper's released code.
        first_token_from_expert (`bool`, *optional*, defaults to `False`):
            Draw the first token of each guided rollout from the expert alone, as in the paper's released code.

        > Parameters that control how strongly guided rollouts count (Eq. 9-11)

        guidance_coef (`float`, *optional*, defaults to `1.0`):
            alpha at step 0, the factor on the advantages of guided rollouts.
        guidance_schedule (`str`, *optional*, defaults to `"cosine"`):
            How alpha falls to 0: `"cosine"`, `"linear"`, or `"constant"` (at once, after `guidance_steps`). At 0 nothing guided is
            generated any more: all rollouts are on-policy, and the expert is not called.
        guidance_steps (`float`, *optional*, defaults to `0.6`):
            Optimizer steps until alpha is 0. If smaller than 1, a share of all training steps; `inf` keeps alpha where it starts.
        reward_range (`float`, *optional*):
            Span of the total reward, which divides guided advantages. When unset, the sum of the absolute weights of the reward functions
            that scored the rollout: each is taken to span [0, 1]. A rollout counts as correct in the logs when its total reward exceeds
            half of it.
        guided_importance_correction (`str`, *optional*, defaults to `"none"`):
            Weight of guided tokens for having been drawn from the mixture: `"none"` (the paper), pi_theta_old / pi_mix of each token
            (`"token_truncate"`, `"token_mask"`), or their product over the completion (`"sequence_truncate"`, `"sequence_mask"`).
        importance_ratio_max (`float`, *optional*, defaults to `inf`):
            Ratio above which the weight is truncated to this value, or masked to 0.

        > Parameters that control the sampler; they change its cost, not its law

        guided_sampler (`str`, *optional*, defaults to `"auto"`):
            `"stepwise"` (both models at every token), `"speculative"` (the policy drafts, the expert verifies), or `"auto"`: speculative on
            accelerators, or where `draft_length` is set, if both models have full attention; else stepwise.
        draft_length (`int`, *optional*):
            Tokens drafted per round of the speculative sampler. When unset, chosen from the acceptance and the forward costs measured so
            far; set it where two runs must agree to the last bit.
        max_draft_length (`int`, *optional*, defaults to `16`):
            Upper bound of a chosen draft length.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "expert_model_init_kwargs"]

    preset: str | None = _option(
        "Named settings that fill the guidance parameters left unset.", choices=sorted(PRESETS)
    )

    num_guided_generations: int | None = _option(
        "Rollouts of each prompt drawn from the mixture of policy and expert (default 0)."
    )
    expert_model_name_or_path: str | None = _option("Hub id or local path of the expert.")
    expert_model_revision: str | None = _option("Revision of the expert on the Hub.")
    expert_model_init_kwargs: dict[str, Any] | str | None = _option(
        "Keyword arguments to load the expert with, as JSON."
    )

    guidance_weighting: str | None = _option(
        "How the expert's share follows from the policy's entropy (default entropy).", choices=sorted(WEIGHTINGS)
    )
    guidance_weight_max: float | None = _option("Upper bound of the expert's share (default 1.0).")
    entropy_quantile: float | None = _option(
        "Quantile of on-policy token entropies that is the threshold (default 0.95)."
    )
    entropy_threshold_init: float | None = _option(
        "Threshold in nats before the first measurement; unset: the first batch is not guided."
    )
    entropy_threshold_floor: float | None = _option("Lower bound of the threshold in nats (default 0.0).")
    mixture_policy: str | None = _option("The policy half of the mixture (default current).", choices=MIXTURE_POLICIES)
    first_token_from_expert: bool | None = _option(
        "Draw the first token of guided rollouts from the expert alone (default False).", nargs="?", const=True
    )

    guidance_coef: float | None = _option("Factor on the advantages of guided rollouts at step 0 (default 1.0).")
    guidance_schedule: str | None = _option("How that factor falls to 0 (default cosine).", choices=SCHEDULES)
    guidance_steps: float | None = _option(
        "Optimizer steps until the factor is 0; below 1, a share of all steps; inf, never (default 0.6)."
    )
    reward_range: float | None = _option(
        "Span of the total reward; unset: the sum of the absolute weights of the reward functions that apply."
    )
    guided_importance_correction: str | None = _option(
        "Importance weight of guided tokens (default none).", choices=CORRECTIONS
    )
    importance_ratio_max: float | None = _option("Ratio that truncates or masks the importance weight (default inf).")

    guided_sampler: str | None = _option("Which sampler draws guided rollouts (default auto).", choices=SAMPLERS)
    draft_length: int | None = _option(
        "Tokens drafted per round of the speculative sampler; unset: chosen by measurement."
    )
    max_draft_length: int | None = _option("Upper bound of a chosen draft length (default 16).")

    def __post_init__(self):
        explicit = self._fill_unset()
        self._check_values()
        super().__post_init__()
        if self.num_guided_generations > 0:
            self._check_groups()
            self._check_combinations()
        self._warn_without_effect(explicit)

    def _fill_unset(self) -> set[str]:
        """Fill what is None from the preset, then from the defaults. Returns the names that the user set."""
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {self.preset!r}.")
        explicit = {name for name in GUIDANCE_FIELDS if getattr(self, name) is not None}
        for name, value in {**DEFAULTS, **PRESETS.get(self.preset, {})}.items():
            if name not in explicit:
                setattr(self, name, value)
        return explicit

    def _check_values(self) -> None:
        self._check_numbers()
        choices = {
            "guidance_weighting": WEIGHTINGS,
            "guidance_schedule": SCHEDULES,
            "guided_importance_correction": CORRECTIONS,
            "guided_sampler": SAMPLERS,
            "mixture_policy": MIXTURE_POLICIES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {getattr(self, name)!r}.")
        if not 0 <= self.entropy_quantile <= 1:
            hint = (
                f" It is a fraction: pass {self.entropy_quantile / 100:g} for the {self.entropy_quantile:g}th percentile."
                * (1 < self.entropy_quantile <= 100)
            )
            raise ValueError(f"entropy_quantile must lie in [0, 1], got {self.entropy_quantile:g}.{hint}")
        if not 0 <= self.guidance_weight_max <= 1:
            raise ValueError(
                f"guidance_weight_max must lie in [0, 1], got {self.guidance_weight_max:g}: it bounds the expert's share."
            )
        for name, bound in AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"{name} must be at least {bound}, got {value:g}.")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value:g}.")

    def _check_numbers(self) -> None:
        for name in ("entropy_quantile", "guidance_weight_max", *AT_LEAST, *POSITIVE):
            value = getattr(self, name)
            if value is None:
                continue
            kind, expected = (Integral, "a whole number") if name in WHOLE else (Real, "a number")
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError(f"{name} must be {expected}, got {value!r}.")
            if math.isinf(value) and name not in MAY_BE_INFINITE:
                raise ValueError(f"{name} must be finite, got {value}.")

    def _check_groups(self) -> None:
        on_policy = self.num_generations - self.num_guided_generations
        if on_policy < 2:
            raise ValueError(
                f"num_guided_generations={self.num_guided_generations} of num_generations={self.num_generations} leaves {on_policy} on-policy "
                "rollouts per prompt, but their mean and standard deviation are the baseline: at least 2 are needed. Guide fewer rollouts or "
                "raise num_generations."
            )
        local = self.per_device_train_batch_size * self.steps_per_generation
        if local % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size * steps_per_generation = {self.per_device_train_batch_size} * {self.steps_per_generation} = "
                f"{local} is no multiple of num_generations={self.num_generations}: a group would be split over processes, which would then "
                "disagree on its guided rollouts. Change one of the three so that each process holds whole groups."
            )

    def _check_combinations(self) -> None:
        truncating = {
            "top_p": self.top_p not in (None, 1.0),
            "top_k": bool(self.top_k) and self.top_k > 0,
            "min_p": bool(self.min_p),
            "repetition_penalty": self.repetition_penalty != 1.0,
        }
        if changed := [f"{name}={getattr(self, name)}" for name, is_on in truncating.items() if is_on]:
            raise ValueError(
                f"Guided rollouts are drawn from the full distribution, got {', '.join(changed)}: guided and on-policy rollouts would follow "
                "different policies, and importance ratios would be wrong. Leave these at their defaults and use `temperature`."
            )
        if self.generation_kwargs:
            raise ValueError(
                f"Guided rollouts do not know generation_kwargs, got {self.generation_kwargs}: they would follow another policy than the "
                "on-policy ones. Leave it unset and use `temperature` and `max_completion_length`."
            )
        if self.use_vllm:
            raise ValueError(
                "use_vllm=True cannot be combined with num_guided_generations > 0 yet. Set use_vllm=False: rollouts are then generated with "
                "transformers."
            )
        if self.max_completion_length is None:
            raise ValueError("Guided rollouts need a bound on their length, got max_completion_length=None. Set it.")
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation={self.multi_objective_aggregation!r} normalises each reward over all rollouts, which has no "
                "counterpart for guided ones. Use 'sum_then_normalize'."
            )
        if self.importance_sampling_level == "sequence" and self.guided_importance_correction.startswith("token"):
            raise ValueError(
                f"importance_sampling_level='sequence' has one ratio per completion, but guided_importance_correction="
                f"{self.guided_importance_correction!r} weighs single tokens. Use 'sequence_truncate' or 'sequence_mask', or "
                "importance_sampling_level='token'."
            )
        if self.mixture_policy == "initial" and self.guided_importance_correction != "none":
            raise ValueError(
                f"guided_importance_correction={self.guided_importance_correction!r} needs the probabilities of the current policy, but with "
                "mixture_policy='initial' the sampler sees only those of the initial one. Use mixture_policy='current' or 'none'."
            )

    def _warn_without_effect(self, explicit: set[str]) -> None:
        """A setting without effect in the chosen mode is named once. One that says the default anyway is not worth a word."""
        explicit = {name for name in explicit if getattr(self, name) != DEFAULTS.get(name)}
        idle = {
            "num_guided_generations=0": self.num_guided_generations == 0
            and GUIDANCE_FIELDS - {"num_guided_generations"},
            f"guidance_coef={self.guidance_coef:g} and guidance_steps={self.guidance_steps:g}, where alpha is 0 at every step": not (
                self.guidance_coef_schedule(self.max_steps if self.max_steps > 0 else sys.maxsize)(0)
            )
            and GUIDANCE_FIELDS - {"guidance_coef", "guidance_steps"},
            "guidance_weighting='constant'": self.guidance_weighting == "constant"
            and {"entropy_quantile", "entropy_threshold_init", "entropy_threshold_floor"},
            "guided_importance_correction='none'": self.guided_importance_correction == "none"
            and {"importance_ratio_max"},
            "guided_sampler='stepwise'": self.guided_sampler == "stepwise" and {"draft_length", "max_draft_length"},
            f"draft_length={self.draft_length}": self.draft_length is not None and {"max_draft_length"},
        }
        for reason, names in idle.items():
            if names and (without_effect := sorted(explicit & names)):
                warnings.warn(f"{', '.join(without_effect)} set, but without effect with {reason}.", stacklevel=4)
                break  # the first reason covers the others

    def guidance_coef_schedule(self, max_steps: int) -> Schedule:
        """alpha as a function of the optimizer step, for a run of `max_steps` steps."""
        steps = self.guidance_steps * max_steps if self.guidance_steps < 1 else self.guidance_steps
        steps = round(steps) if math.isfinite(steps) else steps
        if self.guidance_schedule == "constant":
            return join([constant(self.guidance_coef), constant(0.0)], boundaries=[steps])
        anneal = {"cosine": cosine, "linear": linear}[self.guidance_schedule]
        return anneal(self.guidance_coef, 0.0, steps)


GUIDANCE_FIELDS = frozenset(SelectiveGuidanceGRPOConfig.__annotations__) - {"preset"}
