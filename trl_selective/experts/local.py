"""A frozen causal language model in this process that guides token by token.

Policy and expert must share one vocabulary, id by id: the expert reads the policy's token ids, and the policy takes the expert's. Heads may be
padded to different sizes (Qwen2.5-3B and 7B are), and one tokenizer may have more tokens than the other behind the last shared id.
"""

import os
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

Expert: TypeAlias = PreTrainedModel | PeftModel
LOCATION_KWARGS = ("subfolder", "cache_dir", "token", "local_files_only", "trust_remote_code")


def load_expert(
    expert: str | os.PathLike | Expert,
    device: torch.device,
    *,
    revision: str | None = None,
    init_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    offload: bool = False,
) -> Expert:
    """Load the expert if it is a name, freeze it, and put it on `device` in evaluation mode.

    Args:
        expert: Hub id, local path, or model. A model is frozen in place.
        device: where rollouts are generated. A model with a device map or quantised weights stays where it was loaded.
        revision: of a Hub id.
        init_kwargs: for `AutoModelForCausalLM.from_pretrained`; `dtype` defaults to bfloat16 on accelerators and float32 on CPUs,
            `use_safetensors` to True.
        trust_remote_code: the default of the argument of that name.
        offload: leave it in main memory, to be used within `on_device`.

    Raises:
        ValueError: if there is no such model, if `revision` or `init_kwargs` is given beside a model, or if one that stays where it was
            loaded is to be offloaded.
    """
    if isinstance(expert, (str, os.PathLike)):
        kwargs = {"trust_remote_code": trust_remote_code, "use_safetensors": True, **(init_kwargs or {})}
        if "torch_dtype" not in kwargs:  # the older name
            kwargs.setdefault("dtype", torch.float32 if device.type == "cpu" else torch.bfloat16)
        try:
            expert = AutoModelForCausalLM.from_pretrained(expert, revision=revision, **kwargs)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"The expert {str(expert)!r} could not be loaded. Expected a Hub id, a folder with a model, or a model; its weights in safetensors, "
                "into which `save_pretrained` puts older ones (or set use_safetensors to False in expert_model_init_kwargs, if you trust them). "
                f"{error}"
            ) from error
    elif revision or init_kwargs:
        raise ValueError(
            f"expert_model is a {type(expert).__name__}, but expert_model_revision={revision!r} and expert_model_init_kwargs={init_kwargs!r} "
            "say how to load one. Pass the expert as a name or path, or leave both unset."
        )
    expert = expert.requires_grad_(False).eval()
    is_placed = hasattr(expert, "hf_device_map") or getattr(expert, "quantization_method", None) is not None
    if is_placed and offload:
        raise ValueError(
            "expert_model_offload=True needs an expert that can be moved, got one with a device map or quantised weights, which stays where it "
            "was loaded. Set expert_model_offload=False, or load the expert without either."
        )
    return expert if is_placed else expert.to("cpu" if offload else device)


def accelerator_or_cpu() -> torch.device:
    """Where models run by default. A build of PyTorch for accelerators names one also where there is none."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device or torch.device("cpu")


@contextmanager
def on_device(expert: Expert, device: torch.device) -> Iterator[None]:
    """An offloaded expert on `device`, and in main memory again afterwards."""
    try:
        expert.to(device)
        yield
    finally:
        expert.to("cpu")


def load_expert_tokenizer(
    expert: Expert,
    *,
    revision: str | None = None,
    init_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the expert's weights, or None (with a warning) if the model does not say where it came from.

    Args:
        expert, revision, init_kwargs, trust_remote_code: as for `load_expert`; of `init_kwargs`, what tells where the files are.

    Raises:
        ValueError: if there is none.
    """
    name = expert.config.name_or_path
    if not name:
        warnings.warn(
            "The expert was built in memory, so its tokenizer is unknown and its vocabulary is taken to be the policy's. Pass "
            "`expert_processing_class` to have it checked.",
            stacklevel=2,
        )
        return None
    where = {key: value for key, value in (init_kwargs or {}).items() if key in LOCATION_KWARGS}
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=revision, **{"trust_remote_code": trust_remote_code, **where}
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer could be loaded beside the expert {name!r}, to compare its vocabulary with the policy's. Save it there, or pass "
            "`expert_processing_class` to the trainer."
        ) from error


def check_expert(
    expert: Expert,
    expert_tokenizer: PreTrainedTokenizerBase | None,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Collection[int],
) -> int:
    """Make sure that expert and policy mean the same by a token id, and end completions alike.

    Args:
        expert: the expert.
        expert_tokenizer: its tokenizer; None leaves the vocabulary unchecked.
        tokenizer: the policy's.
        eos_token_ids: ids that end a completion of the policy.

    Returns:
        Number of shared token ids: 0 to this are tokens of both.

    Raises:
        ValueError: if a token has two ids, or if the expert ends its answers with an id that does not end the policy's.
    """
    num_shared = check_vocabulary(expert_tokenizer, tokenizer)
    ends = expert.generation_config.eos_token_id if expert.generation_config else None
    ends = {*(ends if isinstance(ends, list) else [ends])} | {getattr(expert_tokenizer, "eos_token_id", None)}
    if foreign := sorted(ends - {None} - set(eos_token_ids)):
        names = [tokenizer.convert_ids_to_tokens(i) for i in foreign]
        raise ValueError(
            f"The expert ends its answers with {names} (ids {foreign}), but the policy ends with ids {sorted(eos_token_ids)} only, so that "
            f"rollouts would run on behind the expert's end. Give the policy a tokenizer whose `eos_token` is {names[0]!r}, add the ids to its "
            "`generation_config.eos_token_id`, or correct the expert's."
        )
    return num_shared


def check_vocabulary(expert_tokenizer: PreTrainedTokenizerBase | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """Make sure that a token id means the same to both. Arguments, result and errors as for `check_expert`."""
    ours = tokenizer.get_vocab()
    theirs = ours if expert_tokenizer is None else expert_tokenizer.get_vocab()
    num_shared = 1 + min(max(ours.values()), max(theirs.values()))
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        if index < num_shared and theirs.get(token) != index:
            raise ValueError(
                f"The expert's tokenizer maps {token!r} to {theirs.get(token)} but the policy's maps it to {index}. Token-level guidance needs "
                "one vocabulary: choose an expert of the policy's model family."
            )
    if others := _others(tokenizer, num_shared):
        warnings.warn(
            f"The expert's tokenizer has no {_names(others)}, as the policy's has: the expert never draws them, and was not trained to read them.",
            stacklevel=4,
        )
    return num_shared


def check_readable(expert: Expert, tokenizer: PreTrainedTokenizerBase, head_size: int) -> None:
    """Refuse an expert that has no embeddings for what the policy may say or be asked.

    Args:
        expert: the expert.
        tokenizer: the policy's.
        head_size: ids that the policy itself has logits for.

    Raises:
        ValueError: naming a token.
    """
    num_readable = expert.config.get_text_config().vocab_size
    others = _others(tokenizer, num_readable)
    if unreadable := {token: index for token, index in others.items() if index < head_size}:
        raise ValueError(
            f"The expert reads token ids below {num_readable}, but the policy's tokenizer has {_names(unreadable)}. Token-level guidance needs one "
            f"vocabulary: save the expert with more embeddings (`resize_token_embeddings({1 + max(unreadable.values())})`, in which case it never "
            "draws these tokens), or leave them out of the policy's tokenizer."
        )


def _others(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, int]:
    """Tokens from id `size` on, but for the one that pads."""
    vocabulary = tokenizer.get_vocab().items()
    return {token: index for token, index in vocabulary if index >= size and index != tokenizer.pad_token_id}


def _names(tokens: dict[str, int]) -> str:
    token, index = min(tokens.items(), key=lambda item: item[1])
    return f"token {token!r} (id {index})" + (f" and {len(tokens) - 1} more" if len(tokens) > 1 else "")
