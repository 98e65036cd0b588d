"""Builds what guides a run out of its settings: the expert, the sampler, the injector. Knows nothing of TRL but its config."""

import copy
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from trl_selective.checks import check_expert_argument, check_shared_base
from trl_selective.config import SelectiveGuidanceGRPOConfig
from trl_selective.engines.coin import Coin
from trl_selective.engines.engine import LocalEngine, ServedEngine
from trl_selective.engines.sampler import VllmCoinSampler, choose_sentinel
from trl_selective.experts import (
    CompletionReader,
    Expert,
    ExpertServer,
    check_expert,
    check_readable,
    connect_expert,
    load_adapter_tokenizer,
    load_expert,
    load_expert_tokenizer,
    share_base,
    with_own_forwards,
)
from trl_selective.injection import Injector
from trl_selective.sampling import GuidedSampler, make_sampler
from trl_selective.selection import Selector, Trigger, make_selector, make_trigger
from trl_selective.sharding import check_whole, loading_whole


def needs_expert(args: TrainingArguments, arguments: dict[str, Any], expert_model: Any) -> bool:
    """Whether an expert model has to be set up. One that has no use is named in a warning.

    Args:
        args: of the run; a plain `GRPOConfig` asks for no guidance.
        arguments: of the trainer's constructor, by name.
        expert_model: the expert as given there or in the config.

    Raises:
        ValueError: if one is needed, and what is given is none.
    """
    shares_base = getattr(args, "expert_model_shares_base", False)
    is_given = expert_model is not None or shares_base

    def check(need: str, way_out: str) -> None:
        if shares_base:
            check_shared_base(arguments, expert_model)
        else:
            check_expert_argument(arguments, expert_model, need, way_out)

    if getattr(args, "num_guided_generations", 0):
        check("num_guided_generations > 0", "set num_guided_generations=0 for plain GRPO")
        if shares_base and not expert_model and arguments.get("peft_config"):
            warnings.warn(
                "The policy's base model guides its new adapter: both are the same model, so that the expert changes no token until training has moved "
                "the policy, and then leads it back. Name another adapter of the base as expert_model.",
                stacklevel=3,
            )
        return True
    if getattr(args, "injection_needs_expert_logps", False):
        if is_given or args.expert_logprobs_column is None:
            check(
                f"injection_correction={args.injection_correction!r} without an expert_logprobs_column",
                "set expert_logprobs_column, or use 'policy_shaping'",
            )
        return is_given
    if is_given:
        warnings.warn(
            "An expert is given, but without effect: num_guided_generations is 0. Set it in a SelectiveGuidanceGRPOConfig.",
            stacklevel=3,
        )
    return False


def make_expert(
    args: SelectiveGuidanceGRPOConfig,
    expert_model: Any,
    expert_tokenizer: PreTrainedTokenizerBase | None,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Collection[int],
    accelerator: Accelerator,
) -> tuple[Expert | ExpertServer, int]:
    """The expert, where it will be used, and how many ids it shares with the policy.

    Args:
        args: says where the expert is, and how it is loaded.
        expert_model: its name, folder or model; of an adapter, where it shares the policy's base.
        expert_tokenizer: to be compared with the policy's; None for the one beside its weights.
        policy: the model that is trained.
        tokenizer: the policy's.
        eos_token_ids: that end a completion.
        accelerator: of the run.

    Raises:
        ValueError: if it cannot guide this policy.
        ExpertServerError: if its server cannot.
    """
    if not isinstance(expert_tokenizer, PreTrainedTokenizerBase | None):
        raise ValueError(
            f"expert_processing_class must be a tokenizer, got {expert_tokenizer!r}. Load it: `AutoTokenizer.from_pretrained(...)`."
        )
    if args.expert_model_server_url is not None:
        server = connect_expert(
            args.expert_model_server_url,
            expert_model,
            tokenizer,
            expert_tokenizer=expert_tokenizer,
            eos_token_ids=eos_token_ids,
            max_completion_length=args.max_completion_length,
            temperature=args.temperature,
            patience=args.expert_model_server_patience,
            scores=args.guided_importance_correction != "none",
        )
        return server, server.vocab_size
    revision, trust_remote_code = args.expert_model_revision, args.trust_remote_code
    if args.expert_model_shares_base:
        adapter = expert_model or None
        expert = load_expert(share_base(policy, adapter, revision=revision), accelerator.device)
        # In the precision that the policy computes in.
        expert = accelerator.prepare_model(expert, evaluation_mode=True)
        if expert_tokenizer is None and adapter is not None:
            expert_tokenizer = load_adapter_tokenizer(adapter, revision=revision, trust_remote_code=trust_remote_code)
    else:
        source = {
            "revision": revision,
            "init_kwargs": args.expert_model_init_kwargs,
            "trust_remote_code": trust_remote_code,
        }
        check_whole(accelerator, expert_model)
        with loading_whole(accelerator):
            expert = load_expert(expert_model, accelerator.device, **source, offload=args.expert_model_offload)
        expert_tokenizer = expert_tokenizer or load_expert_tokenizer(expert, **source)
    check_readable(expert, tokenizer, policy.config.get_text_config().vocab_size)
    room = getattr(expert.config.get_text_config(), "max_position_embeddings", None)
    if args.num_guided_generations and room is not None and room <= args.max_completion_length:
        warnings.warn(
            f"The expert was made for texts of {room} tokens (max_position_embeddings), but completions alone may have max_completion_length="
            f"{args.max_completion_length}: beyond, it guides by positions that it has never seen, or fails where it has no more. Shorten them, or "
            "choose an expert for longer texts.",
            stacklevel=4,
        )
    return expert, check_expert(expert, expert_tokenizer, tokenizer, eos_token_ids)


def make_local_sampler(
    args: SelectiveGuidanceGRPOConfig,
    policy: PreTrainedModel | PeftModel,
    expert: Expert | ExpertServer,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
) -> GuidedSampler:
    """The sampler of a policy in this process, which shares the first `vocab_size` ids with the expert."""
    if args.mixture_policy == "initial":
        policy = with_own_forwards(copy.deepcopy(policy)).requires_grad_(False).eval().to(accelerator.device)
    num_drawable = drawable(tokenizer, expert)
    return make_sampler(
        args.guided_sampler,
        policy,
        expert,
        draft_length=args.draft_length,
        max_draft_length=args.max_draft_length,
        weighting=args.guidance_weighting,
        max_weight=args.guidance_weight_max,
        vocab_size=vocab_size,
        policy_vocab_size=num_drawable,
        pad_token_id=padding(tokenizer, num_drawable),
        first_token_from_expert=args.first_token_from_expert,
    )


def drawable(tokenizer: PreTrainedTokenizerBase, expert: Expert | ExpertServer) -> int:
    """How many ids rollouts may hold: the policy's tokens, but for one to pad with that the expert could not read."""
    known = 1 + max(tokenizer.get_vocab().values())
    return known if isinstance(expert, ExpertServer) else min(known, expert.config.get_text_config().vocab_size)


def padding(tokenizer: PreTrainedTokenizerBase, num_drawable: int) -> int:
    """An id to pad with that both models can read: what is masked out is read all the same."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id < num_drawable else 0


def make_vllm_sampler(
    args: SelectiveGuidanceGRPOConfig,
    llm: Any,
    policy: PreTrainedModel | PeftModel,
    expert: Expert | ExpertServer,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Collection[int],
) -> VllmCoinSampler:
    """The sampler of a policy in vLLM, `llm` or the server that `args` names, which shares the first `vocab_size` ids with the expert."""
    engine: LocalEngine | ServedEngine
    if args.vllm_mode == "colocate":
        engine = LocalEngine(llm)
    else:
        engine = ServedEngine(args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}")
    head_size = policy.config.get_text_config().vocab_size
    num_drawable = drawable(tokenizer, expert)
    vocab_size_of_coin = min(head_size, num_drawable)
    sentinel = choose_sentinel(head_size, vocab_size_of_coin, tokenizer, eos_token_ids)
    return VllmCoinSampler(
        engine,
        policy,
        expert,
        Coin(args.guidance_weighting, 0.0, float(args.guidance_weight_max), vocab_size_of_coin, sentinel),
        expert_vocab_size=vocab_size,
        pad_token_id=padding(tokenizer, num_drawable),
        first_token_from_expert=args.first_token_from_expert,
    )


def make_injector(
    args: SelectiveGuidanceGRPOConfig,
    trigger: Trigger | None,
    selector: Selector | None,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Collection[int],
    *,
    needs_logps: bool,
    render: Callable[[Sequence[Mapping], bool], str],
    probability: Callable[[float], float],
    reward_weights: Float[Tensor, "funcs"],
) -> Injector:
    """What reads expert completions and puts them into groups.

    Args:
        args: says which columns they are in, and when they are used.
        trigger, selector: of the user's own, in place of those that `args` names.
        tokenizer: the policy's.
        eos_token_ids: that end a completion; the tokenizer's own is appended if it is one of them.
        needs_logps, render: as for `CompletionReader`.
        probability: of the trigger "with_probability", at a step.
        reward_weights: on the CPU.

    Raises:
        ValueError: if `trigger` or `selector` is none.
    """
    for name, given, kind in (("injection_trigger", trigger, Trigger), ("injection_selector", selector, Selector)):
        if not isinstance(given, kind | None):
            raise ValueError(
                f"{name} of the trainer must be an object of a subclass of {kind.__name__}, got {given!r}. Names such as {getattr(args, name)!r} go into "
                "the config."
            )
    reader = CompletionReader(
        tokenizer,
        eos_token_ids=sorted(eos_token_ids, key=lambda token: token != tokenizer.eos_token_id),
        max_completion_length=args.max_completion_length,
        completions_column=args.expert_completions_column,
        logprobs_column=args.expert_logprobs_column,
        sources_column=args.expert_sources_column,
        overlong=args.overlong_expert_completions,
        needs_logps=needs_logps,
        render=render,
    )
    return Injector(
        reader,
        trigger=trigger or make_trigger(args.injection_trigger, args.injection_threshold, probability),
        selector=selector or make_selector(args.injection_selector),
        per_group=args.num_injected_completions,
        per_batch=args.max_injected_per_batch,
        keep_failed=args.injection_advantage == "group",
        replaces=args.injection_replaces,
        reward_weights=reward_weights,
        seed=args.seed,
        gather=gather_object,
    )
