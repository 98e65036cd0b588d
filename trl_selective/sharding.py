"""Policies whose parameters are divided among the processes: FSDP2 and DeepSpeed ZeRO-3.

Every forward of such a model is a collective operation, which all processes must make together. Guided rollouts end at different times, and
processes have different numbers of completions to score: so the whole policy is gathered for as long as that takes, as TRL does with ZeRO-3,
and no forward waits for another process. All processes begin and end that time together, also those without rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    disable_fsdp_ram_efficient_loading,
    enable_fsdp_ram_efficient_loading,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from trl_selective.config import SelectiveGuidanceGRPOConfig
from trl_selective.experts import evaluation_mode


def is_zero3(accelerator: Accelerator) -> bool:
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def _fsdp_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    return getattr(accelerator.state, "fsdp_plugin", None)


def _fsdp_loads_parts(accelerator: Accelerator) -> bool:
    """Whether models that are loaded have their weights on the first process alone."""
    plugin = _fsdp_plugin(accelerator)
    return plugin is not None and bool(plugin.cpu_ram_efficient_loading)


def fsdp_version(accelerator: Accelerator) -> int | None:
    """1 or 2; None without FSDP."""
    plugin = _fsdp_plugin(accelerator)
    return None if plugin is None else plugin.fsdp_version


def is_sharded(accelerator: Accelerator) -> bool:
    return is_zero3(accelerator) or fsdp_version(accelerator) is not None


def check_gathers(accelerator: Accelerator, ds3_gather_for_generation: bool, what: str) -> None:
    """Refuse ways of sharding in which the policy cannot be whole while `what` runs it.

    Raises:
        ValueError: saying what to use.
    """
    if fsdp_version(accelerator) == 1:
        raise ValueError(
            f"{what} needs the whole policy on each process while it samples, which FSDP1 cannot give. Use FSDP2: `fsdp_version: 2` in the "
            "accelerate config, as in TRL's fsdp2.yaml."
        )
    if is_zero3(accelerator) and not ds3_gather_for_generation:
        raise ValueError(
            f"{what} needs the whole policy on each process while it samples, got ds3_gather_for_generation=False with ZeRO-3. Set it to True, or "
            "use ZeRO-2 or FSDP2."
        )


def check_second_models(accelerator: Accelerator, args: SelectiveGuidanceGRPOConfig) -> None:
    """Refuse models that are made out of the policy before it is sharded.

    Raises:
        ValueError: naming the setting.
    """
    settings = {
        "expert_model_shares_base=True": args.expert_model_shares_base,
        "mixture_policy='initial'": args.mixture_policy == "initial",
    }
    for setting in [name for name, is_on in settings.items() if is_on and is_sharded(accelerator)]:
        raise ValueError(
            f"{setting} keeps a second model around the policy's own parameters or a copy of them, which FSDP and ZeRO-3 divide among the processes. "
            "Unset it (the base of an adapter can be loaded once more as the expert), or use DDP or ZeRO-2."
        )


@contextmanager
def loading_whole(accelerator: Accelerator) -> Iterator[None]:
    """Models that are loaded in here are whole on every process. Elsewhere ZeRO-3 divides all that is loaded, and FSDP with
    `cpu_ram_efficient_loading` leaves all processes but the first without weights, which only the policy is given later."""
    if is_zero3(accelerator):
        plugin = accelerator.state.deepspeed_plugin
        try:
            with plugin.zero3_init_context_manager(enable=False):
                unset_hf_deepspeed_config()
                yield
        finally:
            plugin.set_deepspeed_weakref()  # with `zero3_init_flag: false` nobody else tells Transformers again
    elif _fsdp_loads_parts(accelerator):
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
    if (is_zero3(accelerator) or _fsdp_loads_parts(accelerator)) and isinstance(expert, nn.Module):
        raise ValueError(
            f"expert_model is a {type(expert).__name__}, which ZeRO-3, or FSDP with cpu_ram_efficient_loading, has not loaded whole on every "
            "process. Pass its name or path instead."
        )


@contextmanager
def unsharded(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """All parameters of a model under FSDP2 on every process, in the precision that it computes in; under ZeRO-3, where TRL has gathered them,
    and otherwise the model as it is. A process may make any number of forwards in here, or none."""
    with _without_hooks(model) if is_zero3(accelerator) else _gathered_by_fsdp2(model, accelerator):
        yield


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """No hooks before a forward of the model itself. TRL takes those of DeepSpeed off while it gathers, all but one: the processes compare the
    order of their modules, until two forwards and backwards had the same."""
    hooks = model._forward_pre_hooks  # noqa: SLF001
    kept = dict(hooks)
    hooks.clear()
    try:
        yield
    finally:
        hooks.update(kept)


@contextmanager
def _gathered_by_fsdp2(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
        if modules:
            _run_once(model)
    finally:
        plugin = _fsdp_plugin(accelerator)
        for module in modules:
            module.reshard()
            # Torch does not tell what it was. With that of the plugin, embeddings and head follow it as well: one gather more in a backward.
            module.set_reshard_after_forward(plugin is None or bool(plugin.reshard_after_forward), recurse=False)


@torch.no_grad()
def _run_once(model: nn.Module) -> None:
    """One token through the whole model, so that nothing that FSDP2 remembers of the forwards before differs between processes, or is half done.

    It gathers, at the end of the backward of a loss, what ran before the loss: where nothing did, the other processes would wait in vain. And
    torch before 2.13 does not gather modules of a group of which one has not run, as the head in TRL's log-probabilities, in the next forward.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with evaluation_mode(model):
        model(input_ids=token)
