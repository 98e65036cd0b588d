"""Tiny random causal language models whose next-token laws are far from uniform and depend on the whole text."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

COMMON = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
WINDOW = {**COMMON, "sliding_window": 3}
ARCHITECTURES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, COMMON),
    "qwen2": (Qwen2Config, COMMON),
    # positions that are not relative, and a table of them that ends: prompts of up to 5 tokens and 12 more
    "gpt2": (GPT2Config, {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 17, "eos_token_id": 1}),
    "sliding": (MistralConfig, WINDOW),
    "sliding_and_full": (Qwen2Config, {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "gemma3": (Gemma3TextConfig, {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "convolution": (Lfm2Config, {**COMMON, "layer_types": ["conv", "full_attention"]}),
    "local": (
        GPTNeoConfig,
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
    ),
    "alibi": (MptConfig, {"d_model": 16, "n_layers": 2, "n_heads": 2}),
    "state_and_attention": (
        JambaConfig,
        {
            **COMMON,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "state_beside_attention": (
        FalconH1Config,
        {**COMMON, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1},
    ),
    "moe": (
        Qwen3MoeConfig,
        {
            **COMMON,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "output_router_logits": True,
        },
    ),
    "recurrent": (MambaConfig, {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}),
}
FORGETFUL = ["llama", "qwen2", "gpt2", "moe"]  # full attention: rejected tokens can be masked out of the cache
MINDFUL = [
    "sliding",
    "sliding_and_full",
    "gemma3",
    "convolution",
    "local",
    "alibi",
    "state_and_attention",
    "state_beside_attention",
]


def tiny_model(
    seed: int, architecture: str = "llama", vocab_size: int = 7, sharpness: float = 1.0, **changes
) -> PreTrainedModel:
    """A model in evaluation mode with random weights; `sharpness` scales its logits."""
    config_class, settings = ARCHITECTURES[architecture]
    config = config_class(**{**settings, "vocab_size": vocab_size, "tie_word_embeddings": False, **changes})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.5, generator=generator)
        model.get_output_embeddings().weight.mul_(sharpness)
    return model.eval()


def tiny_adapter(seed: int, **model) -> PeftModel:
    """A `tiny_model` with LoRA weights that matter."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    adapted = get_peft_model(tiny_model(seed, **model), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.7, generator=generator)
    return adapted


class Opaque(nn.Module):
    """Hides what its model's forward takes."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class AllLogits(nn.Module):
    """A model whose forward knows no `logits_to_keep`, and returns those of the whole block."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
