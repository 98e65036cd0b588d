"""An expert that is the policy's own base model, or another adapter of it: no second copy of the weights in memory.

TRL's trainers switch the adapter off for such a forward. Here policy and expert take turns within one rollout, each with a cache of its own, so
the expert gets modules of its own around the same parameters instead: nothing that it does, and no error in it, touches the policy's adapters,
modes or gradient checkpointing, and checkpoints of the policy know nothing of it.
"""

import copy
import itertools
import os
import warnings
from typing import TypeVar

from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

Model = TypeVar("Model", bound=PreTrainedModel | PeftModel)

# LoRA's initialisations that take from the base weights what they give to the adapter.
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def share_base(
    policy: PeftModel, adapter: str | os.PathLike | None = None, *, revision: str | None = None
) -> PreTrainedModel | PeftModel:
    """The base model of `policy` as a model of its own, with `adapter` on it. Its parameters and buffers are those of the policy's base.

    Make it when the policy is where it will train: a parameter that is replaced later is replaced in the policy alone.

    Args:
        policy: a model with adapters.
        adapter: folder or Hub id of an adapter of the same base; None for the base alone.
        revision: of a Hub id.

    Raises:
        ValueError: if an adapter trains or has moved parameters of the base, so that the base is not what it was; if `adapter` is none, or
            does not fit.
    """
    for config in policy.peft_config.values():
        _check_leaves_base_alone(config, "policy")
        if config.is_prompt_learning or not hasattr(policy.base_model, "unload"):
            raise ValueError(
                f"The policy has a {type(config).__name__} adapter, which cannot be taken off its base. Use an adapter that changes weights, such as "
                "LoRA, or load the expert as a model of its own: expert_model_shares_base=False."
            )
    base = _with_same_tensors(policy).unload()
    if trained := [name for name, parameter in base.named_parameters() if parameter.requires_grad]:
        raise ValueError(
            f"The policy's adapter trains whole modules ({', '.join(trained[:3])}), so that the base model is not what it was. Use an adapter "
            "without modules_to_save, or load the expert as a model of its own: expert_model_shares_base=False."
        )
    return base if adapter is None else _put_on(base, adapter, revision)


def load_adapter_tokenizer(
    adapter: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside an adapter; None if there is none, as the adapter of a base that keeps its own."""
    try:
        return AutoTokenizer.from_pretrained(adapter, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None


def _with_same_tensors(policy: PeftModel) -> PeftModel:
    """A copy of the modules around the same parameters and buffers."""
    tensors = itertools.chain(policy.parameters(), policy.buffers())
    return with_own_forwards(copy.deepcopy(policy, {id(tensor): tensor for tensor in tensors}))


def with_own_forwards(model: Model) -> Model:
    """The copy of a model that is trained, in place, with the forwards of its classes: those that TRL puts there refer to the trained model. The
    head goes on to compute in its own precision, which TRL can raise (`cast_lm_head_to_fp32`)."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if hasattr(module, "_hf_hook"):  # accelerate's, which places tensors
            continue
        if module.__dict__.pop("forward", None) is not None and module is head:
            module.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype), *args[1:]))
    return model


def _put_on(base: PreTrainedModel, adapter: str | os.PathLike, revision: str | None) -> PeftModel:
    try:
        config = PeftConfig.from_pretrained(str(adapter), revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expert_model_shares_base=True takes an adapter of the policy's base model, got {str(adapter)!r}, where none was found. Name a folder "
            f"or Hub id with an adapter_config.json, leave it unset for the base itself, or set expert_model_shares_base=False. {error}"
        ) from error
    _check_leaves_base_alone(config, "expert")
    made_for = config.base_model_name_or_path
    if made_for and made_for != base.config.name_or_path:
        warnings.warn(
            f"The expert {str(adapter)!r} was made for {made_for!r}, and guides from the base {base.config.name_or_path!r}: an adapter is an expert "
            "on its own base only.",
            stacklevel=2,
        )
    try:
        return PeftModel.from_pretrained(base, adapter, config=config, revision=revision)
    except (RuntimeError, ValueError) as error:  # shapes, names of modules
        raise ValueError(
            f"The expert {str(adapter)!r} does not fit on the policy's base model. Choose an adapter of that base, or set "
            f"expert_model_shares_base=False to load it with a base of its own. {error}"
        ) from error


def _check_leaves_base_alone(config: PeftConfig, whose: str) -> None:
    bias, start = getattr(config, "bias", "none"), getattr(config, "init_lora_weights", True)
    settings = {
        "bias": bias not in ("none", False),
        "init_lora_weights": str(start).startswith(MOVES_BASE),
        "kasa_config": getattr(config, "kasa_config", None) is not None,
        "layer_replication": getattr(config, "layer_replication", None) is not None,
    }
    if changed := [f"{name}={getattr(config, name)!r}" for name, is_on in settings.items() if is_on]:
        raise ValueError(
            f"The {whose}'s adapter has {', '.join(changed)}, which changes the base model that policy and expert would share. Use an "
            "adapter that leaves the base alone, or load the expert as a model of its own: expert_model_shares_base=False."
        )
