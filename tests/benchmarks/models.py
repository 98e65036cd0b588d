"""A policy with random weights, and experts that agree with it as much as one likes."""

import copy
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from trl_selective.functional.mixed_policy import entropy, guidance_weight
from trl_selective.sampling.unguided import sample_completions

NUM_PROBED = 8  # completions of the policy on which agreement is measured
PROBE_LENGTH = 64


@dataclass(frozen=True)
class Shape:
    """Of a Qwen2 model. `sharpness` scales its logits: random weights are near uniform, trained models are not."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    head_dim: int = 64
    sharpness: float = 40.0
    dtype: torch.dtype = torch.float32


SHAPES = {
    "tiny": Shape(16, 2, 50, head_dim=8),
    "small": Shape(256, 4, 2048),
    "0.5b": Shape(896, 24, 151_936, sharpness=8.0, dtype=torch.bfloat16),
    "3b": Shape(2048, 36, 151_936, head_dim=128, sharpness=8.0, dtype=torch.bfloat16),
    "7b": Shape(3584, 28, 151_936, head_dim=128, sharpness=8.0, dtype=torch.bfloat16),
}


def make_policy(shape: Shape, device: str = "cpu") -> PreTrainedModel:
    heads = shape.hidden_size // shape.head_dim
    config = Qwen2Config(
        hidden_size=shape.hidden_size,
        intermediate_size=3 * shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=next(n for n in range(max(1, heads // 4), 0, -1) if heads % n == 0),
        vocab_size=shape.vocab_size,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        policy = AutoModelForCausalLM.from_config(config, dtype=shape.dtype).eval()
    with torch.no_grad():
        policy.lm_head.weight.mul_(shape.sharpness)
    return policy


def make_expert(policy: PreTrainedModel, times: int) -> PreTrainedModel:
    """A copy with `times` as many layers. The added ones pass on what they get, at the full cost of a layer."""
    expert = copy.deepcopy(policy)
    layers = expert.model.layers
    for _ in range(times - 1):
        for layer in policy.model.layers:
            added = copy.deepcopy(layer)
            added.self_attn.layer_idx = len(layers)
            with torch.no_grad():
                added.self_attn.o_proj.weight.zero_()
                added.mlp.down_proj.weight.zero_()
            layers.append(added)
    expert.config.num_hidden_layers = len(layers)
    expert.config.layer_types = ["full_attention"] * len(layers)
    return expert.requires_grad_(False)


@dataclass
class Agreement:
    """Of policy and expert on the policy's own text, means over tokens."""

    entropy: float
    entropy_threshold: float  # the 0.95-quantile of the entropies, as in training
    weight: float  # w
    rejected: float  # w TV(pi_theta, pi*): the chance that a draft is rejected


class Disagreement:
    """Noise on the expert's head, scaled so that policy and expert disagree as much as wanted."""

    def __init__(self, policy: PreTrainedModel, expert: PreTrainedModel):
        self.policy, self.expert = policy, expert
        self.head = policy.lm_head.weight.detach()
        self.noise = torch.randn_like(self.head) * self.head.float().std()
        prompts = make_prompts(policy, NUM_PROBED)
        completions = sample_completions(
            policy, prompts, max_completion_length=PROBE_LENGTH, eos_token_ids=[], pad_token_id=0
        )
        texts = torch.tensor(completions, device=policy.device)
        with torch.no_grad():
            self.hidden = policy.model(texts).last_hidden_state

    def set(self, rejected: float) -> Agreement:
        """Search the scale at which a draft is rejected with this probability."""
        low, high = 0.0, 4.0
        for _ in range(20):
            scale = (low + high) / 2
            agreement = self._measure(scale)
            low, high = (scale, high) if agreement.rejected < rejected else (low, scale)
        with torch.no_grad():
            self.expert.lm_head.weight.copy_(self.head + scale * self.noise)
        return agreement

    @torch.no_grad()
    def _measure(self, scale: float) -> Agreement:
        entropies, distances = [], []
        for hidden in self.hidden:  # one completion at a time: vocabularies are large
            policy, expert = (
                (hidden @ head.T).float().softmax(-1) for head in (self.head, self.head + scale * self.noise)
            )
            entropies.append(entropy(policy))
            distances.append(0.5 * (policy - expert).abs().sum(-1))
        entropies, distances = torch.cat(entropies), torch.cat(distances)
        threshold = entropies.quantile(0.95).item()
        weights = guidance_weight(entropies, threshold, 1.0)
        return Agreement(
            entropies.mean().item(), threshold, weights.mean().item(), (weights * distances).mean().item()
        )


def make_prompts(policy: PreTrainedModel, batch: int) -> list[list[int]]:
    """Groups of four rows with one prompt of 20 to 40 random tokens, as GRPO has them."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = policy.config.vocab_size
    prompts = []
    for _ in range(-(-batch // 4)):
        length = int(torch.randint(20, 41, (), generator=generator))
        prompts += [torch.randint(vocab_size, (length,), generator=generator).tolist()] * 4
    return prompts[:batch]
