"""A policy with random weights, and experts that agree with it as much as one likes."""

import copy
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from trl_selective.functional.mixed_policy import entropy, guidance_weight
from trl_selective.sampling import StepwiseSampler
from trl_selective.sampling.unguided import sample_completions

NUM_PROBED = 16  # completions on which agreement is measured
PROBE_LENGTH = 128
NUM_SEARCHES = 4  # for the noise of the expert, each on text that was drawn with the noise before


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
    """Of policy and expert on text of their mixture, means over tokens."""

    entropy: float
    entropy_threshold: float  # the 0.95-quantile of the entropies on the policy's own text, as in training
    weight: float  # w
    rejected: float  # w TV(pi_theta, pi*): the chance that a draft is rejected


class Disagreement:
    """Noise on the expert's head, scaled so that policy and expert disagree as much as wanted where the mixture takes them."""

    def __init__(self, policy: PreTrainedModel, expert: PreTrainedModel, length: int = PROBE_LENGTH):
        self.policy, self.expert = policy, expert
        self.head = policy.lm_head.weight.detach()
        self.noise = torch.randn_like(self.head) * self.head.float().std()
        self.prompts = make_prompts(policy, NUM_PROBED)
        self.call = {"max_completion_length": length, "eos_token_ids": []}
        self.own_texts = sample_completions(policy, self.prompts, pad_token_id=0, **self.call)
        entropies = [entropy(self._laws(hidden, 0)[0]) for hidden in self._read(self.own_texts)]
        self.entropy_threshold = torch.cat(entropies).quantile(0.95).item()

    def set(self, rejected: float) -> Agreement:
        """Search the scale at which a draft is rejected with this probability, on texts that are drawn anew as the scale is found."""
        sampler, texts = StepwiseSampler(self.policy, self.expert), self.own_texts
        for _ in range(NUM_SEARCHES):
            hidden, low, high = self._read(texts), 0.0, 4.0
            for _ in range(20):
                scale = (low + high) / 2
                agreement = self._measure(hidden, scale)
                low, high = (scale, high) if agreement.rejected < rejected else (low, scale)
            with torch.no_grad():
                self.expert.lm_head.weight.copy_(self.head + scale * self.noise)
            rollout = sampler.sample(self.prompts, entropy_threshold=self.entropy_threshold, **self.call)
            texts = rollout.completion_ids
        return self._measure(self._read(texts), scale)

    @torch.no_grad()
    def _read(self, completions: list[list[int]]) -> list[torch.Tensor]:
        """For each completion, (tokens, hidden): the policy's states before its tokens."""
        states = []
        for prompt, completion in zip(self.prompts, completions, strict=True):
            text = torch.tensor([[*prompt, *completion[:-1]]], device=self.policy.device)
            states.append(self.policy.model(text).last_hidden_state[0, len(prompt) - 1 :])
        return states

    def _laws(self, hidden: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        policy, expert = (
            (hidden @ head.T).float().softmax(-1) for head in (self.head, self.head + scale * self.noise)
        )
        return policy, expert

    @torch.no_grad()
    def _measure(self, hidden: list[torch.Tensor], scale: float) -> Agreement:
        entropies, distances = [], []
        for states in hidden:  # one completion at a time: vocabularies are large
            policy, expert = self._laws(states, scale)
            entropies.append(entropy(policy))
            distances.append(0.5 * (policy - expert).abs().sum(-1))
        entropies, distances = torch.cat(entropies), torch.cat(distances)
        weights = guidance_weight(entropies, self.entropy_threshold, 1.0)
        return Agreement(
            entropies.mean().item(),
            self.entropy_threshold,
            weights.mean().item(),
            (weights * distances).mean().item(),
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
