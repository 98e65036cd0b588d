"""How much memory does a run need on each device? An estimate from shapes alone: no weights are loaded.

Parameters are counted on the model itself, built without storage, so any architecture and any adapter will do. What is left out: the CUDA
context and fragmentation (some GiB), buffers of NCCL, copies that live for one operation, and windows of sliding attention (counted as full).
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from trl_selective.sampling.kv import REPACK_ABOVE

GIB = 2**30
FLOAT32 = 4  # bytes
HEAD_TILE = 4096  # tokens whose logits exist at once in the loss: TRL >= 1.15 projects them in tiles

# What the backward pass of one layer keeps for each token, in tensors of the hidden and of the feed-forward size: norms and their inputs,
# queries, output of the attention, residuals; gate, activation, up, product. Measured on Llama in tests/test_memory.py.
HIDDEN_TENSORS = 10
FEED_FORWARD_TENSORS = 4


@dataclass(frozen=True)
class ModelSize:
    """What of a model takes memory.

    Attributes:
        num_parameters: tied weights once, adapters not included.
        num_layers, hidden_size, intermediate_size, vocab_size: of the text model.
        kv_values_per_token: keys and values that all layers cache for one token.
    """

    num_parameters: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    kv_values_per_token: int


def build_empty(config: PreTrainedConfig) -> nn.Module:
    """The causal language model of a config, on the meta device: shapes without storage."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def model_size(config: PreTrainedConfig) -> ModelSize:
    """The size of the model that a config describes."""
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return ModelSize(
        num_parameters=build_empty(config).num_parameters(),  # type: ignore[operator]
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        vocab_size=text.vocab_size,
        kv_values_per_token=2 * text.num_hidden_layers * num_kv_heads * head_size,
    )


def num_adapter_parameters(config: PreTrainedConfig, peft_config: PeftConfig) -> int:
    """Trainable parameters of an adapter on the model that a config describes."""
    adapted: Any = get_peft_model(build_empty(config), peft_config)
    return adapted.get_nb_trainable_parameters()[0]


@dataclass(frozen=True)
class Run:
    """One process of a training run.

    Attributes:
        policy: the model that is trained.
        weight_bytes: of one of its weights (2 for bfloat16).
        num_trainable: all of its parameters, or those of the adapter.
        trainable_bytes: of one of them.
        optimizer_values: numbers that the optimizer keeps for each (2 for AdamW).
        expert, expert_bytes: the expert and the bytes of one of its weights; None without one.
        shares_base: the expert's weights are the policy's own base.
        is_expert_offloaded: in main memory while the policy is updated.
        frozen_copies: of the policy: a reference model, the initial policy.
        rows: rollouts that are drawn at once.
        guided_rows: how many of them the expert reads.
        row_tokens: length of each, prompt and completion.
        draft_tokens: positions per row for which the sampler holds whole distributions.
        micro_rows: rows of one forward and backward pass.
        is_checkpointed: activations are recomputed in the backward pass.
        engine_bytes: what an inference engine reserves here, with its own weights and cache (0 for one elsewhere); None: rollouts by Transformers.
        num_shards: processes over which ZeRO and FSDP2 split gradients, optimizer and float32 weights; 1: nothing is split.
        is_policy_sharded: its weights are split as well (ZeRO-3, FSDP2), and whole on each process during rollouts.
    """

    policy: ModelSize
    weight_bytes: int
    num_trainable: int
    trainable_bytes: int
    optimizer_values: int
    rows: int
    guided_rows: int
    row_tokens: int
    micro_rows: int
    is_checkpointed: bool
    expert: ModelSize | None = None
    expert_bytes: int = 2
    shares_base: bool = False
    is_expert_offloaded: bool = False
    frozen_copies: int = 0
    draft_tokens: int = 1
    engine_bytes: int | None = None
    num_shards: int = 1
    is_policy_sharded: bool = False


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device by what takes them: all the time, and in the two phases of a step on top of that."""

    always: dict[str, int]
    rollouts: dict[str, int]
    update: dict[str, int]

    @property
    def rollout_peak(self) -> int:
        return sum(self.always.values()) + sum(self.rollouts.values())

    @property
    def update_peak(self) -> int:
        return sum(self.always.values()) + sum(self.update.values())

    @property
    def peak(self) -> int:
        return max(self.rollout_peak, self.update_peak)


def estimate_memory(run: Run) -> Estimate:
    """What one process needs when every completion has its full length: an upper bound for rollouts, of which finished ones leave the cache."""
    return Estimate(_always(run), _rollouts(run), _update(run))


def rollout_bytes_per_token(run: Run) -> int:
    """Cache of one more token in every row that is still written."""
    return _policy_cache(run) + _expert_cache(run)


def activation_bytes(model: ModelSize, tokens: int, value_bytes: int, is_checkpointed: bool) -> int:
    """What the backward pass needs of the forward pass of so many tokens."""
    layer = (
        tokens * (HIDDEN_TENSORS * model.hidden_size + FEED_FORWARD_TENSORS * model.intermediate_size) * value_bytes
    )
    inputs = model.num_layers * tokens * model.hidden_size * value_bytes
    return inputs + layer if is_checkpointed else model.num_layers * layer


def _always(run: Run) -> dict[str, int]:
    is_adapter = run.num_trainable < run.policy.num_parameters
    optimizer = run.num_trainable * run.optimizer_values * run.trainable_bytes
    if run.num_shards > 1:  # ZeRO works in float32, on weights of its own
        optimizer = run.num_trainable * (run.optimizer_values + 1) * FLOAT32 // run.num_shards
    return _present(
        {
            "policy": _policy_weights(run) // (run.num_shards if run.is_policy_sharded else 1),
            "adapter": is_adapter * run.num_trainable * run.trainable_bytes,
            "optimizer": optimizer,
            "frozen copies of the policy": run.frozen_copies * _policy_weights(run),
            "expert": 0 if run.is_expert_offloaded else _expert_weights(run),
            "inference engine": run.engine_bytes or 0,
        }
    )


def _rollouts(run: Run) -> dict[str, int]:
    has_engine, is_guided = run.engine_bytes is not None, bool(run.guided_rows)
    # The policy's, where no engine has them, and the expert's.
    laws = run.guided_rows if has_engine else run.rows * (1 + is_guided)
    return _present(
        {
            "policy, whole": _policy_weights(run) if run.is_policy_sharded and (is_guided or not has_engine) else 0,
            "expert, offloaded otherwise": _expert_weights(run) if run.is_expert_offloaded else 0,
            "cache of the policy": run.row_tokens * _policy_cache(run),
            "cache of the expert": run.row_tokens * _expert_cache(run),
            "distributions": laws * run.draft_tokens * run.policy.vocab_size * FLOAT32,
        }
    )


def _update(run: Run) -> dict[str, int]:
    tokens = run.micro_rows * run.row_tokens
    return _present(
        {
            "policy, a layer": _policy_weights(run) // run.policy.num_layers if run.is_policy_sharded else 0,
            "gradients": run.num_trainable * run.trainable_bytes // run.num_shards,
            "activations": activation_bytes(run.policy, tokens, run.weight_bytes, run.is_checkpointed),
            "logits": min(tokens, HEAD_TILE) * run.policy.vocab_size * FLOAT32,
        }
    )


def _policy_weights(run: Run) -> int:
    return run.policy.num_parameters * run.weight_bytes


def _policy_cache(run: Run) -> int:
    rows = run.rows if run.engine_bytes is None else 0
    return int(rows * _columns_per_token(run) * run.policy.kv_values_per_token * run.weight_bytes)


def _expert_cache(run: Run) -> int:
    values = run.expert.kv_values_per_token if run.expert else 0
    return int(run.guided_rows * _columns_per_token(run) * values * run.expert_bytes)


def _columns_per_token(run: Run) -> float:
    """Of a cache, at most: guided rollouts leave holes in theirs, and keep room."""
    return REPACK_ABOVE if run.guided_rows else 1.0


def _expert_weights(run: Run) -> int:
    return run.expert.num_parameters * run.expert_bytes if run.expert and not run.shares_base else 0


def _present(parts: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}
