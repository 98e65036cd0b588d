"""Settings that cannot be combined. Each error says which, why, and what to change."""

import math
from typing import Any
from urllib.parse import SplitResult, urlsplit


def check_combinations(args: Any) -> None:
    """Refuse combinations of settings with which nothing can be guided.

    Args:
        args: a `SelectiveGuidanceGRPOConfig` whose values are possible, each for itself.

    Raises:
        ValueError: for the first that cannot work.
    """
    if args.num_guided_generations or args.num_injected_completions:
        _check_groups(args)
        _check_both(args)
        if args.expert_model_server_url is not None:
            _check_server(args)
    if args.num_guided_generations:
        _check_guided(args)
    if args.num_injected_completions:
        _check_injection(args)


def _check_groups(args: Any) -> None:
    on_policy = args.num_generations - args.num_guided_generations - args.num_injected_completions
    if on_policy < 2:
        taken = " and ".join(
            f"{name}={getattr(args, name)}"
            for name in ("num_guided_generations", "num_injected_completions")
            if getattr(args, name)
        )
        raise ValueError(
            f"{taken} of num_generations={args.num_generations} leaves {on_policy} on-policy "
            "rollouts per prompt, but their mean and standard deviation are the baseline: at least 2 are needed. Guide or inject fewer, or "
            "raise num_generations."
        )
    local = args.per_device_train_batch_size * args.steps_per_generation
    if local % args.num_generations:
        raise ValueError(
            f"per_device_train_batch_size * steps_per_generation = {args.per_device_train_batch_size} * {args.steps_per_generation} = "
            f"{local} is no multiple of num_generations={args.num_generations}: a group would be split over processes, which would then "
            "disagree on its guided rollouts. Change one of the three so that each process holds whole groups."
        )


def _check_both(args: Any) -> None:
    """What holds for guided rollouts and injected completions alike."""
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            f"multi_objective_aggregation={args.multi_objective_aggregation!r} normalises each reward over all rollouts, which has no "
            "counterpart for guided ones. Use 'sum_then_normalize'."
        )
    if args.expert_model_shares_base and args.expert_model_offload:
        raise ValueError(
            "expert_model_offload=True would move the base model that the policy needs as well: with expert_model_shares_base=True there is "
            "one. Unset either."
        )
    if args.expert_model_shares_base and args.expert_model_init_kwargs:
        raise ValueError(
            f"expert_model_init_kwargs={args.expert_model_init_kwargs!r} says how to load an expert, but with expert_model_shares_base=True it has "
            "the policy's base model. Use model_init_kwargs, or unset either."
        )
    if args.max_completion_length is None or args.max_completion_length < 1:
        raise ValueError(
            f"Guidance needs a bound on lengths, got max_completion_length={args.max_completion_length}. Set it to the longest completion, in "
            "tokens."
        )
    if not 0 < args.temperature < math.inf:
        raise ValueError(
            f"temperature must be positive and finite, got {args.temperature:g}: rollouts of a group would all be the same, or none at all. "
            "Set it to 1.0, TRL's default."
        )


def _check_guided(args: Any) -> None:
    truncating = {
        "top_p": args.top_p != 1.0,  # None is whatever the model's generation config has
        "top_k": args.top_k is None or args.top_k > 0,
        "min_p": bool(args.min_p),
        "repetition_penalty": args.repetition_penalty != 1.0,
    }
    if changed := [f"{name}={getattr(args, name)}" for name, is_on in truncating.items() if is_on]:
        raise ValueError(
            f"Guided rollouts are drawn from the full distribution, got {', '.join(changed)}: guided and on-policy rollouts would follow "
            "different policies, and importance ratios would be wrong. Leave these at their defaults and use `temperature`."
        )
    if args.generation_kwargs:
        raise ValueError(
            f"Guided rollouts do not know generation_kwargs, got {args.generation_kwargs}: they would follow another policy than the "
            "on-policy ones. Leave it unset and use `temperature` and `max_completion_length`; with vLLM, all rollouts end at the end tokens of "
            "tokenizer and generation config."
        )
    if args.use_vllm:
        _check_vllm(args)
    if args.importance_sampling_level == "sequence" and args.guided_importance_correction.startswith("token"):
        raise ValueError(
            f"importance_sampling_level='sequence' has one ratio per completion, but guided_importance_correction="
            f"{args.guided_importance_correction!r} weighs single tokens. Use 'sequence_truncate' or 'sequence_mask', or "
            "importance_sampling_level='token'."
        )
    if args.mixture_policy == "initial" and args.guided_importance_correction != "none":
        raise ValueError(
            f"guided_importance_correction={args.guided_importance_correction!r} needs the probabilities of the current policy, but with "
            "mixture_policy='initial' the sampler sees only those of the initial one. Use mixture_policy='current' or 'none'."
        )


def _check_vllm(args: Any) -> None:
    if args.guided_sampler not in ("auto", "coin"):
        raise ValueError(
            f"guided_sampler={args.guided_sampler!r} needs the distributions of the policy, but with use_vllm=True an engine draws from them. Use "
            "'coin' or 'auto', or set use_vllm=False."
        )
    if args.mixture_policy == "initial":
        raise ValueError(
            "mixture_policy='initial' needs the initial policy beside the trained one, but with use_vllm=True the engine has the trained one "
            "alone. Use mixture_policy='current', or set use_vllm=False."
        )
    if args.vllm_structured_outputs_regex is not None:
        raise ValueError(
            f"Guided rollouts are drawn from the full distribution, got vllm_structured_outputs_regex={args.vllm_structured_outputs_regex!r}. "
            "Unset it."
        )
    if args.vllm_mode == "colocate" and args.vllm_enable_sleep_mode:
        raise ValueError(
            "vllm_enable_sleep_mode=True puts the engine to sleep before guided rollouts are drawn. Set it to False, and lower "
            "vllm_gpu_memory_utilization instead."
        )
    if args.vllm_mode == "colocate" and args.vllm_tensor_parallel_size > 1:
        raise ValueError(
            f"vllm_tensor_parallel_size={args.vllm_tensor_parallel_size} spreads one engine over processes, each of which writes guided rollouts of "
            "its own. Set it to 1, or use vllm_mode='server'."
        )


def _check_server(args: Any) -> None:
    try:
        address = urlsplit(str(args.expert_model_server_url))
    except ValueError:
        address = urlsplit("")
    if not _is_address(address):
        raise ValueError(
            f"expert_model_server_url must be an address such as 'http://localhost:8000/v1', got {_without_secrets(address)!r}. A key goes "
            "into the environment variable OPENAI_API_KEY, where nobody saves it."
        )
    local = (
        "expert_model_revision",
        "expert_model_init_kwargs",
        "expert_model_offload",
        "expert_model_shares_base",
    )
    if given := [f"{name}={getattr(args, name)!r}" for name in local if getattr(args, name)]:
        raise ValueError(
            f"{', '.join(given)} is for an expert in this process, but expert_model_server_url names a server. Start the server with what "
            "you need, and unset it here."
        )
    if args.num_guided_generations and args.guided_sampler not in ("auto", "coin"):
        raise ValueError(
            f"guided_sampler={args.guided_sampler!r} needs the distributions of the expert, but a server only draws from them. Use 'coin' or "
            "'auto', or load the expert here."
        )
    corrections = {
        "guided_importance_correction": args.num_guided_generations and args.guided_importance_correction != "none",
        "injection_correction": args.injection_needs_expert_logps,
    }
    for name, needs_probabilities in corrections.items():
        if needs_probabilities and args.temperature != 1:
            raise ValueError(
                f"{name}={getattr(args, name)!r} needs the expert's probabilities at temperature={args.temperature:g}, but a server gives "
                f"them at 1 alone. Use temperature=1.0, another {name}, or load the expert here."
            )


def _check_injection(args: Any) -> None:
    if args.importance_sampling_level == "sequence" and args.injection_correction in (
        "policy_shaping",
        "truncated",
    ):
        raise ValueError(
            f"importance_sampling_level='sequence' has one ratio per completion, but injection_correction={args.injection_correction!r} "
            f"weighs single tokens. Use 'sequence_{args.injection_correction}' or 'none', or importance_sampling_level='token'."
        )
    if args.overlong_expert_completions == "truncate" and args.mask_truncated_completions:
        raise ValueError(
            "overlong_expert_completions='truncate' cuts expert completions, and mask_truncated_completions=True masks all that were cut: they "
            "would take the place of rollouts and teach nothing. Use 'drop', or set mask_truncated_completions=False."
        )
    if args.remove_unused_columns:
        raise ValueError(
            f"remove_unused_columns=True drops the column {args.expert_completions_column!r}. Set it to False, TRL's default."
        )


def _without_secrets(address: SplitResult) -> str:
    """An address without what may be a key."""
    return address._replace(netloc=address.netloc.rpartition("@")[2], query="").geturl()


def _is_address(address: SplitResult) -> bool:
    """Whether it is one of HTTP, with no place for a key in it."""
    try:
        is_whole = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:  # no number, or too large a one
        return False
    return is_whole and not address.query and "@" not in address.netloc
