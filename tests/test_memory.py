"""The estimate of memory against models that exist: their parameters, caches, adapters, and what their backward passes keep."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from tests.training import EXPERT, POLICY
from trl_selective.memory import (
    ModelSize,
    Run,
    activation_bytes,
    estimate_memory,
    model_size,
    num_adapter_parameters,
    rollout_bytes_per_token,
)

SMALL = {"num_hidden_layers": 3, "hidden_size": 256, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 100}  # fmt: skip
CONFIGS = [
    LlamaConfig(**SMALL),
    Qwen2Config(**SMALL, tie_word_embeddings=True),
    LlamaConfig(**SMALL | {"head_dim": 64, "num_key_value_heads": 8}),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_and_cache_are_those_of_the_model(config):
    size, model = model_size(config), AutoModelForCausalLM.from_config(config)
    assert size.num_parameters == model.num_parameters()
    cache = model(torch.ones(2, 7, dtype=torch.long), use_cache=True).past_key_values
    values = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert values == 2 * 7 * size.kv_values_per_token


@pytest.mark.parametrize("name", [POLICY, EXPERT])
def test_shipped_models(name):
    assert (
        model_size(AutoConfig.from_pretrained(name)).num_parameters
        == AutoModelForCausalLM.from_pretrained(name).num_parameters()
    )


def test_an_adapter_has_its_own_parameters():
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_config(CONFIGS[0]), lora)
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < num_adapter_parameters(CONFIGS[0], lora) == expected


def saved_bytes(model, token_ids) -> int:
    """What the forward pass keeps for the backward pass, parameters not included; each storage once."""
    kept = []

    def keep(tensor):
        kept.append(tensor)  # also so that no storage is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(token_ids)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for address, size in storages.items() if address not in own)


@pytest.mark.parametrize("config", CONFIGS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_right_within_a_tenth(config, dtype):
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    estimate = activation_bytes(model_size(config), 2 * 300, dtype.itemsize, is_checkpointed=False)
    assert saved_bytes(model, torch.randint(100, (2, 300))) == pytest.approx(estimate, rel=0.1)


def test_checkpointing_keeps_inputs_and_one_layer():
    size = model_size(CONFIGS[0])
    one_layer = activation_bytes(replace(size, num_layers=1), 10, 2, is_checkpointed=False)
    assert activation_bytes(size, 10, 2, is_checkpointed=True) == one_layer + 3 * 10 * 256 * 2


POLICY_SIZE = ModelSize(1000, 2, 8, 16, 50, kv_values_per_token=32)
EXPERT_SIZE = ModelSize(3000, 4, 8, 16, 60, kv_values_per_token=64)
RUN = Run(POLICY_SIZE, 2, 1000, 2, 2, rows=12, guided_rows=4, row_tokens=100, micro_rows=3, is_checkpointed=True, expert=EXPERT_SIZE)  # fmt: skip


def test_a_guided_run_by_hand():
    estimate = estimate_memory(RUN)
    assert estimate.always == {"policy": 2000, "optimizer": 4000, "expert": 6000}
    assert estimate.rollouts == {
        "cache of the policy": 12 * 125 * 32 * 2,  # 25 columns of 125 are holes or room
        "cache of the expert": 4 * 125 * 64 * 2,
        "distributions": 2 * 12 * 50 * 4,
    }
    activations = 2 * 300 * 8 * 2 + 300 * (10 * 8 + 4 * 16) * 2  # inputs of two layers, and one layer
    assert estimate.update == {"gradients": 2000, "activations": activations, "logits": 300 * 50 * 4}
    assert estimate.peak == max(12_000 + 96_000 + 64_000 + 4_800, 12_000 + 2_000 + activations + 60_000)
    assert rollout_bytes_per_token(RUN) * 100 == 96_000 + 64_000


def test_what_changes_what():
    plain = estimate_memory(replace(RUN, expert=None, guided_rows=0))
    assert set(plain.always) == {"policy", "optimizer"}
    assert "cache of the expert" not in plain.rollouts
    assert plain.rollouts["cache of the policy"] == 12 * 100 * 32 * 2  # that of `generate` has neither

    offloaded = estimate_memory(replace(RUN, is_expert_offloaded=True))
    assert offloaded.rollout_peak == estimate_memory(RUN).rollout_peak
    assert offloaded.update_peak == estimate_memory(RUN).update_peak - 6000

    adapter = estimate_memory(replace(RUN, num_trainable=10, trainable_bytes=4)).always
    assert (adapter["adapter"], adapter["optimizer"]) == (40, 80)

    copies = estimate_memory(replace(RUN, frozen_copies=2)).always
    assert copies["frozen copies of the policy"] == 4000

    sharded = estimate_memory(replace(RUN, num_shards=4))
    assert sharded.always["optimizer"] == 1000 * (2 + 1) * 4 // 4  # float32: two moments and the weights
    assert sharded.update["gradients"] == 500

    parted = estimate_memory(replace(RUN, num_shards=4, is_policy_sharded=True))
    assert parted.always == {**sharded.always, "policy": 500}
    assert parted.rollouts == {**sharded.rollouts, "policy, whole": 2000}
    assert parted.update == {**sharded.update, "policy, a layer": 1000}  # of two

    engine = estimate_memory(replace(RUN, engine_bytes=99))
    ours = {
        "cache of the expert": 125 * 4 * EXPERT_SIZE.kv_values_per_token * 2,
        "distributions": 4 * POLICY_SIZE.vocab_size * 4,
    }
    assert (engine.always["inference engine"], engine.rollouts) == (99, ours)
    elsewhere = estimate_memory(replace(RUN, engine_bytes=0, is_expert_offloaded=True))
    assert "inference engine" not in elsewhere.always
    assert elsewhere.rollouts == {"expert, offloaded otherwise": 6000, **ours}
    parted = replace(RUN, engine_bytes=0, num_shards=4, is_policy_sharded=True)
    assert estimate_memory(parted).rollouts == {"policy, whole": 2000, **ours}
    nobody = replace(parted, expert=None, guided_rows=0)
    assert (estimate_memory(nobody).rollouts, rollout_bytes_per_token(nobody)) == ({}, 0)
