"""Policies whose parameters are divided among the processes: FSDP2 and DeepSpeed ZeRO-3.

Every forward of such a model is a collective operation, which all processes must make together. Guided rollouts end at different times, and
processes have different numbers of completions to score: so the whole policy is gathered for as long as that takes, as TRL does with ZeRO-3,
and no forward waits for another process. All processes begin and end that time together, also those without rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import disable_fsdp_ram_efficient_loading, enable_fsdp_ram_efficient_loading
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from trl_selective.config import SelectiveGuidanceGRPOConfig


def is_zero3(accelerator: Accelerator) -> bool:
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def fsdp_version(accelerator: Accelerator) -> int | None:
    """1 or 2; None without FSDP."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return None if plugin is None else plugin.fsdp_version


def check_sharding(accelerator: Accelerator, args: SelectiveGuidanceGRPOConfig, setting: str) -> None:
    """Refuse ways of sharding the policy in which `setting`, the kind of guidance, does not work.

    Raises:
        ValueError: saying what to use.
    """
    if fsdp_version(accelerator) == 1:
        raise ValueError(
            f"{setting} > 0 needs the whole policy on each process while it samples, which FSDP1 cannot give. Use FSDP2: `fsdp_version: 2` in "
            "the accelerate config, as in TRL's fsdp2.yaml."
        )
    if is_zero3(accelerator) and not args.ds3_gather_for_generation:
        raise ValueError(
            f"{setting} > 0 needs the whole policy on each process while it samples, got ds3_gather_for_generation=False with ZeRO-3. Set it to "
            "True, or use ZeRO-2 or FSDP2."
        )
    if not is_zero3(accelerator) and fsdp_version(accelerator) is None:
        return
    for name, is_on in {
        "expert_model_shares_base=True": args.expert_model_shares_base,
        "mixture_policy='initial'": args.mixture_policy == "initial",
    }.items():
        if is_on:
            raise ValueError(
                f"{name} keeps a second model around the policy's own parameters or a copy of them, which FSDP and ZeRO-3 divide among the "
                "processes. Unset it (a small adapter's base can be loaded once more as the expert), or use DDP or ZeRO-2."
            )


@contextmanager
def loading_whole(accelerator: Accelerator) -> Iterator[None]:
    """Models that are loaded in here are whole on every process. Elsewhere ZeRO-3 divides all that is loaded, and FSDP with
    `cpu_ram_efficient_loading` leaves all processes but the first without weights, which only the policy is given later."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if is_zero3(accelerator):
        with accelerator.state.deepspeed_plugin.zero3_init_context_manager(enable=False):
            unset_hf_deepspeed_config()
            yield
    elif plugin is not None and plugin.cpu_ram_efficient_loading:
        disable_fsdp_ram_efficient_loading()
        try:
            yield
        finally:
            enable_fsdp_ram_efficient_loading()
    else:
        yield


def check_whole(accelerator: Accelerator, expert: object) -> None:
    """Refuse an expert that was loaded before, where models are not loaded whole.

    Raises:
        ValueError: if it is a model rather than a name.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    is_partial = is_zero3(accelerator) or (plugin is not None and plugin.cpu_ram_efficient_loading)
    if is_partial and isinstance(expert, nn.Module):
        raise ValueError(
            f"expert_model is a {type(expert).__name__}, which ZeRO-3, or FSDP with cpu_ram_efficient_loading, has not loaded whole on every "
            "process. Pass its name or path instead."
        )


@contextmanager
def unsharded(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """All parameters of a model under FSDP2 on every process, in the precision that it computes in; any other model as it is."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        for module in modules:
            module.reshard()
            # Torch does not tell what it was. With that of the plugin, embeddings and head follow it as well: one gather more in a backward.
            module.set_reshard_after_forward(plugin is None or bool(plugin.reshard_after_forward), recurse=False)
