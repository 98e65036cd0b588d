"""The settings of guidance, beside all of GRPOConfig's. Values and combinations that cannot work fail here, before any model is loaded."""

import math
import sys
import warnings
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from trl import GRPOConfig

from trl_selective.combinations import check_combinations
from trl_selective.experts.completions import OVERLONG
from trl_selective.functional.importance import TRUNCATED
from trl_selective.functional.schedules import Schedule, constant, cosine, join, linear
from trl_selective.injection import REPLACEABLE
from trl_selective.presets import BESIDE, PRESETS
from trl_selective.sampling import WEIGHTINGS
from trl_selective.selection import SELECTORS, make_selector, make_trigger

SCHEDULES = ("cosine", "linear", "constant")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
SAMPLERS = ("auto", "coin", "speculative", "stepwise")
MIXTURE_POLICIES = ("current", "initial")
INJECTION_ADVANTAGES = ("positive_excess", "group")
INJECTION_CORRECTIONS = ("policy_shaping", "sequence_policy_shaping", "truncated", "sequence_truncated", "none")

# Every guidance field is None until it is set by the user, then by the preset, then from here. A field that stays None says so in its help.
DEFAULTS: dict[str, Any] = {
    "num_guided_generations": 0,
    "expert_model_offload": False,
    "expert_model_server_patience": 600.0,
    "expert_model_shares_base": False,
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
    "num_injected_completions": 0,
    "expert_completions_column": "expert_completions",
    "overlong_expert_completions": "drop",
    "injection_trigger": "group_failed",
    "injection_threshold": 0.0,
    "injection_probability": 1.0,
    "injection_probability_schedule": "constant",
    "injection_selector": "random",
    "injection_replaces": "worst",
    "injection_advantage": "positive_excess",
    "injection_correction": "policy_shaping",
    "shaping_gamma": 0.1,
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
    "num_injected_completions": 0,
    "max_injected_per_batch": 1,
}
FRACTIONS = ("guidance_weight_max", "injection_probability")
POSITIVE = ("expert_model_server_patience", "reward_range", "importance_ratio_max", "shaping_gamma")
MAY_BE_INFINITE = ("guidance_steps", "importance_ratio_max")
COLUMNS = ("expert_completions_column", "expert_logprobs_column", "expert_sources_column")


def _option(help: str, **kwargs) -> Any:
    return field(default=None, metadata={"help": help, **kwargs})


def _as_told(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as others are told them: of the arguments of `from_pretrained` without the keys for a Hub, and with quantisation as a dict."""
    arguments = {name: settings[name] for name in ("model_init_kwargs", "expert_model_init_kwargs")}
    return settings | {
        name: {
            key: value.to_dict() if hasattr(value, "to_dict") else value
            for key, value in given.items()
            if key != "token"
        }
        for name, given in arguments.items()
        if isinstance(given, dict)
    }


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
            bounded by `guidance_weight_max`), `"mentor_as_released"` (as its published code differs from the paper), `"luffy"`
            (arXiv:2504.14945), or `"selective"` (expert completions for groups that failed). TRL's own settings stay as they are: MENTOR's
            paper has `num_generations=12`, LUFFY's loss is `loss_type="dr_grpo"` with `scale_rewards="none"`.
        num_guided_generations (`int`, *optional*, defaults to `0`):
            How many of the `num_generations` rollouts of each prompt are drawn from the mixture of policy and expert. They are the last
            ones of the group. At least 2 must stay on-policy.
        expert_model_name_or_path (`str`, *optional*):
            Hub id or local path of the expert, used when the trainer's argument `expert_model` is not given.
        expert_model_revision (`str`, *optional*):
            Revision of the expert on the Hub.
        expert_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `AutoModelForCausalLM.from_pretrained` of the expert. `dtype` defaults to bfloat16 on accelerators and to
            float32 on CPUs, `use_safetensors` to `True`.
        expert_model_offload (`bool`, *optional*, defaults to `False`):
            Keep the expert in main memory while it is not sampling or scoring, so that training has its place on the accelerator.
        expert_model_server_url (`str`, *optional*):
            Address of an OpenAI-compatible completions endpoint, such as `http://localhost:8000/v1` of `vllm serve`, that serves the expert
            under the name `expert_model_name_or_path`. No expert is loaded then: the server draws single tokens where a coin of weight w
            shows heads. Its key, if it wants one, is read from the environment variable `OPENAI_API_KEY`.
        expert_model_server_patience (`float`, *optional*, defaults to `600.0`):
            Seconds for which a request to that server is repeated while it fails, before training stops.
        expert_model_shares_base (`bool`, *optional*, defaults to `False`):
            With a policy that trains an adapter (PEFT): the expert is the policy's base model with the adapter that `expert_model_name_or_path`
            names; or, if it names none, that base alone, which a new adapter does not differ from. The weights of the base are in memory once.

        > Parameters that control where the expert steps in (Eq. 6)

        guidance_weighting (`str`, *optional*, defaults to `"entropy"`):
            How the expert's share w of the mixture follows from the policy's entropy H: `"entropy"`, w = min(w_max, H / threshold);
            `"hard_gate"`, w = w_max where H >= threshold, else 0; `"constant"`, w = w_max. w_max is `guidance_weight_max`.
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
            Optimizer steps until alpha is 0. Up to 1, a share of all training steps; `inf` keeps alpha where it starts.
        reward_range (`float`, *optional*):
            Span of the total reward, which divides guided advantages. When unset, the sum of the absolute weights of the reward functions
            that scored any rollout of the group: each is taken to span [0, 1].
        correctness_reward (`str`, *optional*):
            Name of the reward function that tells right from wrong: a rollout counts as correct if it gives more than 0.5. When unset, and
            where it gives `None`, if the total reward exceeds half of its span. What is correct decides which groups have failed
            (`injection_trigger`), and is logged.
        guided_importance_correction (`str`, *optional*, defaults to `"none"`):
            Weight of guided tokens for having been drawn from the mixture: `"none"` (the paper), pi_theta_old / pi_mix of each token
            (`"token_truncate"`, `"token_mask"`), or their product over the completion (`"sequence_truncate"`, `"sequence_mask"`).
        importance_ratio_max (`float`, *optional*, defaults to `inf`):
            Ratio above which the weight is truncated to this value, or masked to 0.

        > Parameters that control the sampler; they change its cost, not its law

        guided_sampler (`str`, *optional*, defaults to `"auto"`):
            `"speculative"` (the policy drafts, the expert verifies), `"coin"` (the expert reads where a coin of weight w shows heads),
            `"stepwise"` (both models at every token), or `"auto"`: speculative if both models have full attention, else coin. With
            `use_vllm=True` it is coin.
        draft_length (`int`, *optional*):
            Tokens drafted per round of the speculative sampler. When unset, chosen from the acceptance and the forward costs measured so
            far; set it where two runs must agree to the last bit.
        max_draft_length (`int`, *optional*, defaults to `16`):
            Upper bound of a chosen draft length.

        > Parameters that control expert completions from the dataset: whether, which, how many

        num_injected_completions (`int`, *optional*, defaults to `0`):
            How many rollouts of a group at most are replaced by whole expert completions. At least 2 rows of a group stay on-policy.
        max_injected_per_batch (`int`, *optional*):
            The same for all groups of a generation batch together, over all processes. The groups with the lowest mean reward come first.
        expert_completions_column (`str`, *optional*, defaults to `"expert_completions"`):
            Column with the completions of a prompt: a list of texts, or of conversations of one assistant message; may be empty.
        expert_logprobs_column (`str`, *optional*):
            Column with their log-probabilities under the expert, one list per completion, one number per token of the policy's tokenizer.
        expert_sources_column (`str`, *optional*):
            Column with the name of the expert that wrote each of them.
        overlong_expert_completions (`str`, *optional*, defaults to `"drop"`):
            What becomes of those longer than `max_completion_length`: `"drop"` or `"truncate"`.
        injection_trigger (`str`, *optional*, defaults to `"group_failed"`):
            Which groups get any: `"always"`, `"group_failed"` (none of its own rollouts is correct), `"zero_variance"` (all have the same
            reward), `"below"` (their mean reward is at most `injection_threshold`), `"with_probability"`, or several of these joined by
            `&` and `|`.
        injection_threshold (`float`, *optional*, defaults to `0.0`):
            Mean reward up to which the trigger `"below"` fires.
        injection_probability (`float`, *optional*, defaults to `1.0`):
            Probability with which the trigger `"with_probability"` fires for a group, at step 0.
        injection_probability_schedule (`str`, *optional*, defaults to `"constant"`):
            How that probability falls to 0 over `guidance_steps`: `"cosine"`, `"linear"`, or `"constant"` (at once, at the end).
        injection_selector (`str`, *optional*, defaults to `"random"`):
            Which completions a group gets: `"first"`, `"random"`, `"shortest"`, `"learnable"` (the policy finds it most likely), `"novel"`
            (overlaps least with the group and with what was injected before), `"diverse"` (makes the group most diverse), `"reward_gain"`
            (the best reward, if better than the group's), `"learned"` (learns what raises success rates), or several of these: `a & b`
            wants both, `a | b` takes b where a refuses all.
        injection_replaces (`str`, *optional*, defaults to `"worst"`):
            Whose place is taken: the rollout with the lowest reward, or the `"last"` of the group, whatever its reward.

        > Parameters that control how strongly expert completions count

        injection_advantage (`str`, *optional*, defaults to `"positive_excess"`):
            `"positive_excess"`, Eq. 11 with the same alpha: a completion counts by what it is better than the group's own rollouts, and one
            that is not stays out. `"group"`: inside the group's baseline, as in LUFFY, also if it is wrong.
        injection_correction (`str`, *optional*, defaults to `"policy_shaping"`):
            Weight of injected tokens, from the current policy's probabilities in each iteration: `"policy_shaping"` (LUFFY),
            `"truncated"` (pi_theta / pi_b up to `importance_ratio_max`), the same for whole completions (`"sequence_policy_shaping"`,
            `"sequence_truncated"`), or `"none"`.
        shaping_gamma (`float`, *optional*, defaults to `0.1`):
            gamma of policy shaping: the probability at which a token's weight is largest.
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
    expert_model_server_url: str | None = _option(
        "Completions endpoint that serves the expert under its name, such as http://localhost:8000/v1 of vllm serve."
    )
    expert_model_server_patience: float | None = _option(
        "Seconds for which a failing request to it is repeated before training stops (default 600)."
    )
    expert_model_offload: bool | None = _option(
        "Keep the expert in main memory between rollouts (default False).", nargs="?", const=True
    )
    expert_model_shares_base: bool | None = _option(
        "The expert is the base model of the adapter that is trained, or another adapter on it (default False).",
        nargs="?",
        const=True,
    )

    guidance_weighting: str | None = _option(
        "How the expert's share follows from the policy's entropy (default entropy).", choices=list(WEIGHTINGS)
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
        "Optimizer steps until the factor is 0; up to 1, a share of all steps; inf, never (default 0.6)."
    )
    reward_range: float | None = _option(
        "Span of the total reward; unset: the sum of the absolute weights of the reward functions that apply."
    )
    correctness_reward: str | None = _option(
        "Reward function that gives correct rollouts more than 0.5; unset: their total reward exceeds half of its span."
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

    num_injected_completions: int | None = _option(
        "Rollouts of a group that expert completions may replace (default 0)."
    )
    max_injected_per_batch: int | None = _option(
        "Rollouts of a generation batch that they may replace; unset: any number."
    )
    expert_completions_column: str | None = _option(
        "Column with the expert completions of a prompt (default expert_completions)."
    )
    expert_logprobs_column: str | None = _option("Column with their log-probabilities under the expert.")
    expert_sources_column: str | None = _option("Column with the names of the experts that wrote them.")
    overlong_expert_completions: str | None = _option(
        "What becomes of those longer than max_completion_length (default drop).", choices=OVERLONG
    )
    injection_trigger: str | None = _option(
        "Which groups get any: always, group_failed, zero_variance, below, with_probability, joined by & and | (default group_failed)."
    )
    injection_threshold: float | None = _option("Mean reward up to which the trigger below fires (default 0.0).")
    injection_probability: float | None = _option(
        "Probability of the trigger with_probability at step 0 (default 1.0)."
    )
    injection_probability_schedule: str | None = _option(
        "How it falls to 0 over guidance_steps (default constant).", choices=SCHEDULES
    )
    injection_selector: str | None = _option(
        f"Which completions a group gets: {', '.join(SELECTORS)}, joined by & and | (default random)."
    )
    injection_replaces: str | None = _option("Whose place in the group is taken (default worst).", choices=REPLACEABLE)
    injection_advantage: str | None = _option(
        "How injected completions are compared with the group (default positive_excess).", choices=INJECTION_ADVANTAGES
    )
    injection_correction: str | None = _option(
        "Importance weight of injected tokens (default policy_shaping).", choices=INJECTION_CORRECTIONS
    )
    shaping_gamma: float | None = _option("gamma of policy shaping, a probability (default 0.1).")

    def __post_init__(self):
        explicit = self._fill_unset()
        self._check_values()
        super().__post_init__()
        if not isinstance(self.expert_model_init_kwargs, dict | None):  # which was JSON until now
            raise ValueError(
                f"expert_model_init_kwargs must be a dict, or one as JSON, such as {{'dtype': 'float32'}}, got {self.expert_model_init_kwargs!r}."
            )
        check_combinations(self)
        self._warn_without_effect(explicit)
        self._warn_unbounded()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no key: the trainer saves the arguments beside the model, and pushes that folder to the Hub."""
        return _as_told({**self.__dict__, "hub_token": None})

    def to_dict(self) -> dict[str, Any]:
        """What trackers are told: Transformers masks `hub_token` alone."""
        return _as_told(super().to_dict())

    def __str__(self) -> str:
        settings = "".join(f"{name}={value!r},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{settings})"

    __repr__ = __str__  # a dataclass would show everything

    def _fill_unset(self) -> set[str]:
        """Fill what is None from the preset, then from the defaults. Returns the names that the user set."""
        if self.preset is not None and self.preset not in list(PRESETS):
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {self.preset!r}.")
        explicit = {name for name in GUIDANCE_FIELDS if getattr(self, name) is not None}
        for name, value in {**DEFAULTS, **PRESETS.get(self.preset, {})}.items():
            if name not in explicit:
                setattr(self, name, value)
        return explicit

    def _check_values(self) -> None:
        self._check_numbers()
        self._check_names()
        if not 0 <= self.entropy_quantile <= 1:
            hint = (
                f" It is a fraction: pass {self.entropy_quantile / 100:g} for the {self.entropy_quantile:g}th percentile."
                * (1 < self.entropy_quantile <= 100)
            )
            raise ValueError(f"entropy_quantile must lie in [0, 1], got {self.entropy_quantile:g}.{hint}")
        for name in FRACTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name):g}: it is a share.")
        for name, bound in AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"{name} must be at least {bound}, got {value:g}.")
        if math.isnan(self.injection_threshold):
            raise ValueError("injection_threshold must be a number, got nan.")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value:g}.")

    def _check_names(self) -> None:
        for option in fields(self):
            allowed = option.metadata.get("choices") if option.name in GUIDANCE_FIELDS else None
            if allowed is not None and getattr(self, option.name) not in list(allowed):
                raise ValueError(f"{option.name} must be one of {list(allowed)}, got {getattr(self, option.name)!r}.")
        for name in ("injection_trigger", "injection_selector"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a name, got {getattr(self, name)!r}. Objects go to the trainer.")
        kinds = (
            (COLUMNS, str, "the name of a column"),
            (("correctness_reward",), str, "the name of a reward function"),
            (SWITCHES, bool, "True or False"),
        )
        for names, kind, expected in kinds:
            for name in names:
                if not isinstance(getattr(self, name), kind | None):
                    raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}.")
        make_trigger(self.injection_trigger, self.injection_threshold, self.injection_probability)
        make_selector(self.injection_selector)

    def _check_numbers(self) -> None:
        for name in ("entropy_quantile", "injection_threshold", *FRACTIONS, *AT_LEAST, *POSITIVE):
            value = getattr(self, name)
            if value is None:
                continue
            kind, expected = (Integral, "a whole number") if name in WHOLE else (Real, "a number")
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError(f"{name} must be {expected}, got {value!r}.")
            if math.isinf(value) and name not in MAY_BE_INFINITE:
                raise ValueError(f"{name} must be finite, got {value}.")

    def _warn_without_effect(self, explicit: set[str]) -> None:
        """Name the settings of the user that do nothing in the chosen mode, once and with the first reason that applies, which covers the others.
        One that says the default anyway is not worth a word."""
        changed = {name for name in explicit if getattr(self, name) != DEFAULTS.get(name)}
        for reason, applies, names in self._idle_settings():
            if applies and (without_effect := sorted(changed & names)):
                warnings.warn(f"{', '.join(without_effect)} set, but without effect with {reason}.", stacklevel=4)
                return

    def _idle_settings(self) -> list[tuple[str, bool, set[str] | frozenset[str]]]:
        """A reason, whether it applies, and the settings that do nothing then."""
        guided, injected = self.num_guided_generations > 0, self.num_injected_completions > 0
        of_guidance = GUIDANCE_FIELDS - INJECTION_FIELDS - {"num_guided_generations"}
        shared = {"guidance_coef", "guidance_schedule", "guidance_steps", "importance_ratio_max"}
        shared |= {"reward_range", "correctness_reward"}
        drafts = {"draft_length", "max_draft_length"}
        coef, steps, correction = self.guidance_coef, self.guidance_steps, self.injection_correction
        first_alpha = self.guidance_coef_schedule(self.max_steps if self.max_steps > 0 else sys.maxsize)(0)
        takes_ratio = self.injection_needs_expert_logps
        by_server = self.expert_model_server_url is not None
        trigger = self.injection_trigger
        of_trigger = {
            *({"injection_threshold"} if "below" not in trigger else ()),
            *(PROBABILITY_FIELDS if "with_probability" not in trigger else ()),
        }
        return [
            ("num_guided_generations=0", not guided and not injected, of_guidance),
            (
                "num_guided_generations=0 (injection does not use it)",
                injected and not guided,
                of_guidance - EXPERT_FIELDS - shared,
            ),
            ("num_injected_completions=0", not injected, INJECTION_FIELDS - {"num_injected_completions"}),
            (
                f"guidance_coef={coef:g} and guidance_steps={steps:g}, where alpha is 0 at every step",
                first_alpha == 0,
                GUIDANCE_FIELDS - {"guidance_coef", "guidance_steps"},
            ),
            (
                "guidance_weighting='constant'",
                self.guidance_weighting == "constant",
                {"entropy_quantile", "entropy_threshold_init", "entropy_threshold_floor"},
            ),
            (
                f"injection_correction={correction!r}, which takes no ratio",
                injected and not takes_ratio,
                {"expert_logprobs_column", *(() if guided else ("importance_ratio_max",))},
            ),
            (
                "guided_importance_correction='none'",
                self.guided_importance_correction == "none" and not takes_ratio,
                {"importance_ratio_max"},
            ),
            (f"guided_sampler={self.guided_sampler!r}", self.guided_sampler in ("coin", "stepwise"), drafts),
            ("no expert_model_server_url", not by_server, {"expert_model_server_patience"}),
            ("use_vllm=True, which takes no drafts", self.use_vllm, drafts),
            ("an expert behind a server, which takes no drafts", by_server, drafts),
            (f"draft_length={self.draft_length}", self.draft_length is not None, {"max_draft_length"}),
            (f"injection_correction={correction!r}", "policy_shaping" not in correction, {"shaping_gamma"}),
            (f"injection_trigger={trigger!r}", True, of_trigger),
        ]

    def _warn_unbounded(self) -> None:
        """A correction that asks for a bound, and has none."""
        guided, injected = self.guided_importance_correction, self.injection_correction
        is_capped = self.guidance_weight_max < 1 and not self.first_token_from_expert
        is_bounded = guided == "token_truncate" and is_capped  # by 1 / (1 - w_max)
        used = {
            "guided_importance_correction": (
                guided,
                self.num_guided_generations and guided != "none" and not is_bounded,
            ),
            "injection_correction": (injected, self.injection_needs_expert_logps),
        }
        for name, (correction, is_used) in used.items():
            if is_used and math.isinf(self.importance_ratio_max):
                warnings.warn(
                    f"{name}={correction!r} with importance_ratio_max=inf masks and truncates nothing: single tokens may have weights of any size. "
                    "Set importance_ratio_max, such as 10.0.",
                    stacklevel=4,
                )

    @property
    def injection_needs_expert_logps(self) -> bool:
        """Whether expert completions are weighted by a ratio to the probability that the expert gave them."""
        return self.num_injected_completions > 0 and self.injection_correction in TRUNCATED

    def in_effect(self) -> dict[str, Any]:
        """The settings of guidance that are set and do something, in their order."""
        idle = {name for _, applies, names in self._idle_settings() if applies for name in names}
        settings = _as_told({option.name: getattr(self, option.name) for option in fields(self)})
        return {
            name: value for name, value in settings.items() if name in GUIDANCE_FIELDS - idle and value is not None
        }

    def preset_in_words(self) -> str:
        """The settings of the preset, and what its paper sets otherwise than this run in TRL's own fields."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self.in_effect().items())
        theirs = {name: value for name, value in BESIDE.get(self.preset, {}).items() if getattr(self, name) != value}
        beside = "".join(
            f" Its paper has {name}={value!r}, here it is {getattr(self, name)!r}." for name, value in theirs.items()
        )
        return f"preset {self.preset!r}: {settings}.{beside}"

    def guidance_coef_schedule(self, max_steps: int) -> Schedule:
        """alpha as a function of the optimizer step, for a run of `max_steps` steps."""
        return self._fall(self.guidance_schedule, self.guidance_coef, max_steps)

    def injection_probability_by_step(self, max_steps: int) -> Schedule:
        """The probability of the trigger `with_probability` as a function of the optimizer step, for a run of `max_steps` steps."""
        return self._fall(self.injection_probability_schedule, self.injection_probability, max_steps)

    def _fall(self, schedule: str, start: float, max_steps: int) -> Schedule:
        """From `start` to 0 over `guidance_steps`."""
        steps = self.guidance_steps * max_steps if self.guidance_steps <= 1 else self.guidance_steps
        steps = round(steps) if math.isfinite(steps) else steps
        if schedule == "constant":
            return join([constant(start), constant(0.0)], boundaries=[steps])
        return {"cosine": cosine, "linear": linear}[schedule](start, 0.0, steps)


GUIDANCE_FIELDS = frozenset(SelectiveGuidanceGRPOConfig.__annotations__) - {"preset"}
WHOLE = frozenset(name for name, kind in SelectiveGuidanceGRPOConfig.__annotations__.items() if kind == int | None)
SWITCHES = tuple(name for name, kind in SelectiveGuidanceGRPOConfig.__annotations__.items() if kind == bool | None)
EXPERT_FIELDS = frozenset(name for name in GUIDANCE_FIELDS if name.startswith("expert_model"))
PROBABILITY_FIELDS = frozenset({"injection_probability", "injection_probability_schedule"})
INJECTION_FIELDS = (
    frozenset(name for name in GUIDANCE_FIELDS if name.startswith("injection_"))
    | {"num_injected_completions", "max_injected_per_batch", "expert_completions_column", "expert_logprobs_column"}
    | {"expert_sources_column", "overlong_expert_completions", "shaping_gamma"}
)
