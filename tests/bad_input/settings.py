"""Settings that cannot work, which the config refuses before any model is loaded, and settings that do nothing, which it names."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.bad_input.case import Case, Error, Warned
from tests.training import make_trainer
from trl_selective import SelectiveGuidanceGRPOConfig

NAN, INF = float("nan"), float("inf")
GUIDED = {"num_generations": 8, "num_guided_generations": 4, "per_device_train_batch_size": 8}
INJECTED = {"num_generations": 8, "num_injected_completions": 2, "per_device_train_batch_size": 8}
SERVER = {**GUIDED, "expert_model_server_url": "http://localhost:8000/v1"}

Rows = list[tuple[dict[str, Any], str]]


def make_config(folder: Path, settings: dict[str, Any]) -> SelectiveGuidanceGRPOConfig:
    return SelectiveGuidanceGRPOConfig(str(folder), **{"bf16": False, **settings})


def cases(kind: type[Case], base: dict[str, Any], rows: Rows) -> list[Case]:
    """One for each row: settings beside those of `base`, and what is said."""

    def make(settings: dict[str, Any], says: str) -> Case:
        given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        return kind(f"`{given}`", lambda folder: make_config(folder, {**base, **settings}), says)

    return [make(*row) for row in rows]


OF_GUIDANCE: Rows = [
    ({"preset": "mentro"}, "preset must be one of ['luffy', 'mentor', 'mentor_as_released', 'mentor_corrected', 'selective'], got 'mentro'."),
    ({"guidance_weighting": "soft"}, "guidance_weighting must be one of ['entropy', 'hard_gate', 'constant'], got 'soft'."),
    ({"guidance_schedule": "exp"}, "guidance_schedule must be one of ['cosine', 'linear', 'constant'], got 'exp'."),
    ({"guided_importance_correction": "clip"}, "guided_importance_correction must be one of ['none', 'token_truncate', 'token_mask', 'sequence_truncate', 'sequence_mask'], got 'clip'."),
    ({"guided_sampler": "fast"}, "guided_sampler must be one of ['auto', 'coin', 'speculative', 'stepwise'], got 'fast'."),
    ({"mixture_policy": "old"}, "mixture_policy must be one of ['current', 'initial'], got 'old'."),
    ({"entropy_quantile": 80}, "entropy_quantile must lie in [0, 1], got 80. It is a fraction: pass 0.8 for the 80th percentile."),
    ({"entropy_quantile": -0.1}, "entropy_quantile must lie in [0, 1], got -0.1."),
    ({"guidance_weight_max": 1.5}, "guidance_weight_max must lie in [0, 1], got 1.5: it is a share."),
    ({"num_guided_generations": -1}, "num_guided_generations must be at least 0, got -1."),
    ({"guidance_coef": -1.0}, "guidance_coef must be at least 0, got -1."),
    ({"guidance_coef": NAN}, "guidance_coef must be at least 0, got nan."),
    ({"guidance_steps": -5}, "guidance_steps must be at least 0, got -5."),
    ({"entropy_threshold_floor": -1.0}, "entropy_threshold_floor must be at least 0, got -1."),
    ({"draft_length": 0}, "draft_length must be at least 1, got 0."),
    ({"max_draft_length": 0}, "max_draft_length must be at least 1, got 0."),
    ({"reward_range": 0.0}, "reward_range must be positive, got 0."),
    ({"importance_ratio_max": 0.0}, "importance_ratio_max must be positive, got 0."),
    ({"num_guided_generations": 7}, "num_guided_generations=7 of num_generations=8 leaves 1 on-policy rollouts per prompt, but their mean and standard deviation are the baseline: at least 2 are needed. Guide or inject fewer, or raise num_generations."),
    ({"num_guided_generations": 8}, "num_guided_generations=8 of num_generations=8 leaves 0 on-policy rollouts per prompt, but their mean and standard deviation are the baseline: at least 2 are needed. Guide or inject fewer, or raise num_generations."),
    ({"num_guided_generations": 2.0}, "num_guided_generations must be a whole number, got 2.0."),
    ({"num_guided_generations": True}, "num_guided_generations must be a whole number, got True."),
    ({"draft_length": 2.5}, "draft_length must be a whole number, got 2.5."),
    ({"entropy_quantile": "0.9"}, "entropy_quantile must be a number, got '0.9'."),
    ({"guidance_coef": INF}, "guidance_coef must be finite, got inf."),
    ({"reward_range": INF}, "reward_range must be finite, got inf."),
    ({"entropy_threshold_init": INF}, "entropy_threshold_init must be finite, got inf."),
    ({"max_completion_length": None}, "Guidance needs a bound on lengths, got max_completion_length=None. Set it to the longest completion, in tokens."),
    ({"top_p": 0.9}, "Guided rollouts are drawn from the full distribution, got top_p=0.9: guided and on-policy rollouts would follow different policies, and importance ratios would be wrong. Leave these at their defaults and use `temperature`."),
    ({"top_k": None}, "Guided rollouts are drawn from the full distribution, got top_k=None: guided and on-policy rollouts would follow different policies, and importance ratios would be wrong. Leave these at their defaults and use `temperature`."),
    ({"top_k": 50, "min_p": 0.1}, "Guided rollouts are drawn from the full distribution, got top_k=50, min_p=0.1: guided and on-policy rollouts would follow different policies, and importance ratios would be wrong. Leave these at their defaults and use `temperature`."),
    ({"repetition_penalty": 1.1}, "Guided rollouts are drawn from the full distribution, got repetition_penalty=1.1: guided and on-policy rollouts would follow different policies, and importance ratios would be wrong. Leave these at their defaults and use `temperature`."),
    ({"generation_kwargs": {"num_beams": 2}}, "Guided rollouts do not know generation_kwargs, got {'num_beams': 2}: they would follow another policy than the on-policy ones. Leave it unset and use `temperature` and `max_completion_length`; with vLLM, all rollouts end at the end tokens of tokenizer and generation config."),
    ({"use_vllm": True, "guided_sampler": "speculative"}, "guided_sampler='speculative' needs the distributions of the policy, but with use_vllm=True an engine draws from them. Use 'coin' or 'auto', or set use_vllm=False."),
    ({"use_vllm": True, "guided_sampler": "stepwise"}, "guided_sampler='stepwise' needs the distributions of the policy, but with use_vllm=True an engine draws from them. Use 'coin' or 'auto', or set use_vllm=False."),
    ({"use_vllm": True, "mixture_policy": "initial"}, "mixture_policy='initial' needs the initial policy beside the trained one, but with use_vllm=True the engine has the trained one alone. Use mixture_policy='current', or set use_vllm=False."),
    ({"use_vllm": True, "vllm_structured_outputs_regex": "a*"}, "Guided rollouts are drawn from the full distribution, got vllm_structured_outputs_regex='a*'. Unset it."),
    ({"use_vllm": True, "vllm_mode": "colocate", "vllm_enable_sleep_mode": True}, 'vllm_enable_sleep_mode=True puts the engine to sleep before guided rollouts are drawn. Set it to False, and lower vllm_gpu_memory_utilization instead.'),
    ({"use_vllm": True, "vllm_mode": "colocate", "vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size=2 spreads one engine over processes, each of which writes guided rollouts of its own. Set it to 1, or use vllm_mode='server'."),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation='normalize_then_sum' normalises each reward over all rollouts, which has no counterpart for guided ones. Use 'sum_then_normalize'."),
    ({"importance_sampling_level": "sequence", "guided_importance_correction": "token_mask"}, "importance_sampling_level='sequence' has one ratio per completion, but guided_importance_correction='token_mask' weighs single tokens. Use 'sequence_truncate' or 'sequence_mask', or importance_sampling_level='token'."),
    ({"mixture_policy": "initial", "guided_importance_correction": "token_truncate"}, "guided_importance_correction='token_truncate' needs the probabilities of the current policy, but with mixture_policy='initial' the sampler sees only those of the initial one. Use mixture_policy='current' or 'none'."),
    ({"expert_model_offload": "yes"}, "expert_model_offload must be True or False, got 'yes'."),
    ({"expert_model_init_kwargs": "float32"}, "expert_model_init_kwargs must be a dict, or one as JSON, such as {'dtype': 'float32'}, got 'float32'."),
    ({"temperature": 0.0}, "temperature must be positive and finite, got 0: rollouts of a group would all be the same, or none at all. Set it to 1.0, TRL's default."),
    ({"temperature": NAN}, "temperature must be positive and finite, got nan: rollouts of a group would all be the same, or none at all. Set it to 1.0, TRL's default."),
    ({"max_completion_length": 0}, "Guidance needs a bound on lengths, got max_completion_length=0. Set it to the longest completion, in tokens."),
    ({"guidance_steps": "half"}, "guidance_steps must be a number, got 'half'."),
    ({"expert_model_shares_base": True, "expert_model_offload": True}, "expert_model_offload=True would move the base model that the policy needs as well: with expert_model_shares_base=True there is one. Unset either."),
    ({"expert_model_shares_base": True, "expert_model_init_kwargs": {"dtype": "float16"}}, "expert_model_init_kwargs={'dtype': 'float16'} says how to load an expert, but with expert_model_shares_base=True it has the policy's base model. Use model_init_kwargs, or unset either."),
]  # fmt: skip

OF_INJECTION: Rows = [
    ({"injection_trigger": "group_failed & sometimes"}, "injection_trigger must be one of ['always', 'group_failed', 'zero_variance', 'below', 'with_probability'], or several of them joined by & and |, got 'group_failed & sometimes' with 'sometimes' in it."),
    ({"injection_trigger": ""}, "injection_trigger must be one of ['always', 'group_failed', 'zero_variance', 'below', 'with_probability'], or several of them joined by & and |, got '' with '' in it."),
    ({"injection_trigger": "always |"}, "injection_trigger must be one of ['always', 'group_failed', 'zero_variance', 'below', 'with_probability'], or several of them joined by & and |, got 'always |' with '' in it."),
    ({"injection_trigger": 3}, "injection_trigger must be a name, got 3. Objects go to the trainer."),
    ({"injection_selector": "learnable | bets"}, "injection_selector must be one of ['first', 'random', 'shortest', 'learnable', 'novel', 'diverse', 'reward_gain', 'learned'], or several of them joined by & and |, got 'learnable | bets' with 'bets' in it."),
    ({"injection_selector": ["first"]}, "injection_selector must be a name, got ['first']. Objects go to the trainer."),
    ({"expert_completions_column": 3}, "expert_completions_column must be the name of a column, got 3."),
    ({"num_injected_completions": 7}, "num_injected_completions=7 of num_generations=8 leaves 1 on-policy rollouts per prompt, but their mean and standard deviation are the baseline: at least 2 are needed. Guide or inject fewer, or raise num_generations."),
    ({"num_injected_completions": 8}, "num_injected_completions=8 of num_generations=8 leaves 0 on-policy rollouts per prompt, but their mean and standard deviation are the baseline: at least 2 are needed. Guide or inject fewer, or raise num_generations."),
    ({"num_injected_completions": 3, "num_guided_generations": 4}, "num_guided_generations=4 and num_injected_completions=3 of num_generations=8 leaves 1 on-policy rollouts per prompt, but their mean and standard deviation are the baseline: at least 2 are needed. Guide or inject fewer, or raise num_generations."),
    ({"num_injected_completions": -1}, "num_injected_completions must be at least 0, got -1."),
    ({"num_injected_completions": 1.0}, "num_injected_completions must be a whole number, got 1.0."),
    ({"num_injected_completions": True}, "num_injected_completions must be a whole number, got True."),
    ({"num_injected_completions": "2"}, "num_injected_completions must be a whole number, got '2'."),
    ({"max_injected_per_batch": 0}, "max_injected_per_batch must be at least 1, got 0."),
    ({"max_injected_per_batch": 2.5}, "max_injected_per_batch must be a whole number, got 2.5."),
    ({"max_injected_per_batch": INF}, "max_injected_per_batch must be a whole number, got inf."),
    ({"injection_probability": 1.5}, "injection_probability must lie in [0, 1], got 1.5: it is a share."),
    ({"injection_probability": -0.1}, "injection_probability must lie in [0, 1], got -0.1: it is a share."),
    ({"injection_probability": NAN}, "injection_probability must lie in [0, 1], got nan: it is a share."),
    ({"injection_probability": "half"}, "injection_probability must be a number, got 'half'."),
    ({"injection_threshold": "low"}, "injection_threshold must be a number, got 'low'."),
    ({"injection_threshold": INF}, "injection_threshold must be finite, got inf."),
    ({"injection_threshold": NAN}, "injection_threshold must be a number, got nan."),
    ({"shaping_gamma": 0.0}, "shaping_gamma must be positive, got 0."),
    ({"shaping_gamma": -0.1}, "shaping_gamma must be positive, got -0.1."),
    ({"shaping_gamma": NAN}, "shaping_gamma must be positive, got nan."),
    ({"shaping_gamma": INF}, "shaping_gamma must be finite, got inf."),
    ({"overlong_expert_completions": "cut"}, "overlong_expert_completions must be one of ['drop', 'truncate'], got 'cut'."),
    ({"injection_probability_schedule": "exp"}, "injection_probability_schedule must be one of ['cosine', 'linear', 'constant'], got 'exp'."),
    ({"injection_replaces": "best"}, "injection_replaces must be one of ['worst', 'last'], got 'best'."),
    ({"injection_advantage": "excess"}, "injection_advantage must be one of ['positive_excess', 'group'], got 'excess'."),
    ({"injection_correction": "token_truncate"}, "injection_correction must be one of ['policy_shaping', 'sequence_policy_shaping', 'truncated', 'sequence_truncated', 'none'], got 'token_truncate'."),
    ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' has one ratio per completion, but injection_correction='policy_shaping' weighs single tokens. Use 'sequence_policy_shaping' or 'none', or importance_sampling_level='token'."),
    ({"importance_sampling_level": "sequence", "injection_correction": "truncated"}, "importance_sampling_level='sequence' has one ratio per completion, but injection_correction='truncated' weighs single tokens. Use 'sequence_truncated' or 'none', or importance_sampling_level='token'."),
    ({"remove_unused_columns": True}, "remove_unused_columns=True drops the column 'expert_completions'. Set it to False, TRL's default."),
    ({"remove_unused_columns": True, "expert_completions_column": "teacher"}, "remove_unused_columns=True drops the column 'teacher'. Set it to False, TRL's default."),
    ({"max_completion_length": None}, "Guidance needs a bound on lengths, got max_completion_length=None. Set it to the longest completion, in tokens."),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation='normalize_then_sum' normalises each reward over all rollouts, which has no counterpart for guided ones. Use 'sum_then_normalize'."),
    ({"num_guided_generations": 2, "top_p": 0.9}, "Guided rollouts are drawn from the full distribution, got top_p=0.9: guided and on-policy rollouts would follow different policies, and importance ratios would be wrong. Leave these at their defaults and use `temperature`."),
    ({"overlong_expert_completions": "truncate", "mask_truncated_completions": True}, "overlong_expert_completions='truncate' cuts expert completions, and mask_truncated_completions=True masks all that were cut: they would take the place of rollouts and teach nothing. Use 'drop', or set mask_truncated_completions=False."),
    ({"correctness_reward": 3}, "correctness_reward must be the name of a reward function, got 3."),
    ({"expert_logprobs_column": 3}, "expert_logprobs_column must be the name of a column, got 3."),
    ({"temperature": -1.0}, "temperature must be positive and finite, got -1: rollouts of a group would all be the same, or none at all. Set it to 1.0, TRL's default."),
]  # fmt: skip

OF_SERVERS: Rows = [
    ({"guided_sampler": "speculative"}, "guided_sampler='speculative' needs the distributions of the expert, but a server only draws from them. Use 'coin' or 'auto', or load the expert here."),
    ({"guided_sampler": "stepwise"}, "guided_sampler='stepwise' needs the distributions of the expert, but a server only draws from them. Use 'coin' or 'auto', or load the expert here."),
    ({"expert_model_offload": True, "expert_model_revision": "v1"}, "expert_model_revision='v1', expert_model_offload=True is for an expert in this process, but expert_model_server_url names a server. Start the server with what you need, and unset it here."),
    ({"expert_model_init_kwargs": {"dtype": "float16"}}, "expert_model_init_kwargs={'dtype': 'float16'} is for an expert in this process, but expert_model_server_url names a server. Start the server with what you need, and unset it here."),
    ({"expert_model_shares_base": True}, "expert_model_shares_base=True is for an expert in this process, but expert_model_server_url names a server. Start the server with what you need, and unset it here."),
    ({"guided_importance_correction": "token_truncate", "temperature": 0.7}, "guided_importance_correction='token_truncate' needs the expert's probabilities at temperature=0.7, but a server gives them at 1 alone. Use temperature=1.0, another guided_importance_correction, or load the expert here."),
    ({"num_injected_completions": 2, "num_guided_generations": 0, "injection_correction": "truncated", "temperature": 0.7}, "injection_correction='truncated' needs the expert's probabilities at temperature=0.7, but a server gives them at 1 alone. Use temperature=1.0, another injection_correction, or load the expert here."),
    ({"expert_model_server_patience": 0.0}, "expert_model_server_patience must be positive, got 0."),
    ({"expert_model_server_patience": INF}, "expert_model_server_patience must be finite, got inf."),
    ({"expert_model_server_url": "localhost:8000/v1"}, "expert_model_server_url must be an address such as 'http://localhost:8000/v1', got 'localhost:8000/v1'. A key goes into the environment variable OPENAI_API_KEY, where nobody saves it."),
    ({"expert_model_server_url": "http:///v1"}, "expert_model_server_url must be an address such as 'http://localhost:8000/v1', got 'http:///v1'. A key goes into the environment variable OPENAI_API_KEY, where nobody saves it."),
    ({"expert_model_server_url": "file:///v1"}, "expert_model_server_url must be an address such as 'http://localhost:8000/v1', got 'file:///v1'. A key goes into the environment variable OPENAI_API_KEY, where nobody saves it."),
    ({"expert_model_server_url": "https://key@host/v1"}, "expert_model_server_url must be an address such as 'http://localhost:8000/v1', got 'https://host/v1'. A key goes into the environment variable OPENAI_API_KEY, where nobody saves it."),
    ({"expert_model_server_url": "https://me:key@host/v1"}, "expert_model_server_url must be an address such as 'http://localhost:8000/v1', got 'https://host/v1'. A key goes into the environment variable OPENAI_API_KEY, where nobody saves it."),
    ({"expert_model_server_url": "https://:key@host/v1"}, "expert_model_server_url must be an address such as 'http://localhost:8000/v1', got 'https://host/v1'. A key goes into the environment variable OPENAI_API_KEY, where nobody saves it."),
    ({"expert_model_server_url": "http://h/v1?k=key"}, "expert_model_server_url must be an address such as 'http://localhost:8000/v1', got 'http://h/v1'. A key goes into the environment variable OPENAI_API_KEY, where nobody saves it."),
    ({"expert_model_server_url": ""}, "expert_model_server_url must be an address such as 'http://localhost:8000/v1', got ''. A key goes into the environment variable OPENAI_API_KEY, where nobody saves it."),
    ({"expert_model_server_url": "http://host:port/v1"}, "expert_model_server_url must be an address such as 'http://localhost:8000/v1', got 'http://host:port/v1'. A key goes into the environment variable OPENAI_API_KEY, where nobody saves it."),
    ({"expert_model_server_url": "http://[::1/v1"}, "expert_model_server_url must be an address such as 'http://localhost:8000/v1', got ''. A key goes into the environment variable OPENAI_API_KEY, where nobody saves it."),
    ({"expert_model_server_url": 3}, "expert_model_server_url must be an address such as 'http://localhost:8000/v1', got '3'. A key goes into the environment variable OPENAI_API_KEY, where nobody saves it."),
]  # fmt: skip

IDLE_OF_GUIDANCE: Rows = [
    ({"num_guided_generations": 0, "guidance_coef": 0.5}, "guidance_coef set, but without effect with num_guided_generations=0."),
    ({"guidance_weighting": "constant", "entropy_quantile": 0.9}, "entropy_quantile set, but without effect with guidance_weighting='constant'."),
    ({"importance_ratio_max": 2.0}, "importance_ratio_max set, but without effect with guided_importance_correction='none'."),
    ({"guided_sampler": "stepwise", "draft_length": 4}, "draft_length set, but without effect with guided_sampler='stepwise'."),
    ({"guided_sampler": "coin", "max_draft_length": 4}, "max_draft_length set, but without effect with guided_sampler='coin'."),
    ({"draft_length": 4, "max_draft_length": 8}, "max_draft_length set, but without effect with draft_length=4."),
    ({"guidance_coef": 0.0}, "num_guided_generations set, but without effect with guidance_coef=0 and guidance_steps=0.6, where alpha is 0 at every step."),
    ({"guidance_steps": 0}, "num_guided_generations set, but without effect with guidance_coef=1 and guidance_steps=0, where alpha is 0 at every step."),
    ({"guidance_steps": 0.1, "max_steps": 3}, "num_guided_generations set, but without effect with guidance_coef=1 and guidance_steps=0.1, where alpha is 0 at every step."),
    ({"use_vllm": True, "max_draft_length": 4}, "max_draft_length set, but without effect with use_vllm=True, which takes no drafts."),
    ({"expert_model_server_patience": 5.0}, "expert_model_server_patience set, but without effect with no expert_model_server_url."),
    ({"expert_model_server_url": "http://localhost:8000/v1", "draft_length": 4}, "draft_length set, but without effect with an expert behind a server, which takes no drafts."),
    ({"num_guided_generations": 0, "expert_model_server_url": "http://localhost:8000/v1"}, "expert_model_server_url set, but without effect with num_guided_generations=0."),
    ({"num_guided_generations": 0, "expert_model_shares_base": True}, "expert_model_shares_base set, but without effect with num_guided_generations=0."),
]  # fmt: skip

IDLE_OF_INJECTION: Rows = [
    ({"num_injected_completions": 0, "injection_selector": "novel"}, "injection_selector set, but without effect with num_injected_completions=0."),
    ({"num_injected_completions": 0, "num_guided_generations": 2, "shaping_gamma": 0.2, "expert_sources_column": "by"}, "expert_sources_column, shaping_gamma set, but without effect with num_injected_completions=0."),
    ({"entropy_quantile": 0.9}, "entropy_quantile set, but without effect with num_guided_generations=0 (injection does not use it)."),
    ({"guided_importance_correction": "token_mask", "draft_length": 4}, "draft_length, guided_importance_correction set, but without effect with num_guided_generations=0 (injection does not use it)."),
    ({"injection_correction": "none", "shaping_gamma": 0.2}, "shaping_gamma set, but without effect with injection_correction='none'."),
    ({"injection_correction": "truncated", "shaping_gamma": 0.2}, "shaping_gamma set, but without effect with injection_correction='truncated'."),
    ({"importance_ratio_max": 2.0}, "importance_ratio_max set, but without effect with injection_correction='policy_shaping', which takes no ratio."),
    ({"expert_logprobs_column": "logps"}, "expert_logprobs_column set, but without effect with injection_correction='policy_shaping', which takes no ratio."),
    ({"injection_threshold": 0.5}, "injection_threshold set, but without effect with injection_trigger='group_failed'."),
    ({"injection_trigger": "always", "injection_probability": 0.5}, "injection_probability set, but without effect with injection_trigger='always'."),
    ({"injection_trigger": "below", "injection_threshold": 0.5, "injection_probability_schedule": "linear"}, "injection_probability_schedule set, but without effect with injection_trigger='below'."),
    ({"guidance_coef": 0.0}, "num_injected_completions set, but without effect with guidance_coef=0 and guidance_steps=0.6, where alpha is 0 at every step."),
]  # fmt: skip

UNBOUNDED_GUIDANCE: Rows = [
    ({"guided_importance_correction": "token_mask"}, "guided_importance_correction='token_mask' with importance_ratio_max=inf masks and truncates nothing: single tokens may have weights of any size. Set importance_ratio_max, such as 10.0."),
]  # fmt: skip

UNBOUNDED_INJECTION: Rows = [
    ({"injection_correction": "truncated"}, "injection_correction='truncated' with importance_ratio_max=inf masks and truncates nothing: single tokens may have weights of any size. Set importance_ratio_max, such as 10.0."),
]  # fmt: skip


def on_two_processes(settings: dict[str, Any]) -> Case:
    """Half a group on each."""

    def cause(folder: Path) -> None:
        with patch.object(SelectiveGuidanceGRPOConfig, "world_size", 2):
            make_config(folder, {**settings, "per_device_train_batch_size": 4})

    says = (
        "per_device_train_batch_size * steps_per_generation = 4 * 1 = 4 is no multiple of num_generations=8: a group would be split over processes, "
        "which would then disagree on its guided rollouts. Change one of the three so that each process holds whole groups."
    )
    return Error("`per_device_train_batch_size=4` on two processes", cause, says)


def begins_too_late(folder: Path) -> None:
    make_trainer(
        folder, entropy_threshold_init=None, guidance_schedule="cosine", guidance_steps=0.5, max_steps=2
    ).train()


SECTIONS = {
    "Settings of token-level guidance": (
        "Beside `num_generations=8, num_guided_generations=4`.",
        [*cases(Error, GUIDED, OF_GUIDANCE), on_two_processes(GUIDED)],
    ),
    "Settings of injection": (
        "Beside `num_generations=8, num_injected_completions=2`.",
        [*cases(Error, INJECTED, OF_INJECTION), on_two_processes(INJECTED)],
    ),
    "Settings of an expert behind a server": (
        "Beside `num_generations=8, num_guided_generations=4, expert_model_server_url='http://localhost:8000/v1'`. No message shows a key.",
        cases(Error, SERVER, OF_SERVERS),
    ),
    "Settings without effect": (
        "They are named once, in a warning. Beside `num_guided_generations=4`, or, in the second half, `num_injected_completions=2`.",
        [
            *cases(Warned, GUIDED, IDLE_OF_GUIDANCE),
            Warned(
                "`max_steps=2, guidance_steps=0.5`, and `entropy_threshold_init` unset",
                begins_too_late,
                "No rollout will be guided: the entropy threshold is measured on the first batch, which lasts until step 1, and alpha is 0 by step 1. "
                "Set entropy_threshold_init, raise guidance_steps, or train for longer.",
            ),
            *cases(Warned, INJECTED, IDLE_OF_INJECTION),
            *cases(Warned, GUIDED, UNBOUNDED_GUIDANCE),
            *cases(Warned, INJECTED, UNBOUNDED_INJECTION),
        ],
    ),
}
