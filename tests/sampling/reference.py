"""What the samplers must agree with: the mixture, computed anew for every prefix by an uncached, unpadded forward in float64."""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from trl_selective.rollout import GuidedRollout
from trl_selective.sampling import CoinSampler, SpeculativeSampler, StepwiseSampler

WITHOUT_DRAFTS = {"stepwise": StepwiseSampler, "coin": CoinSampler}
PROMPTS = [[2, 3, 4, 5, 2], [3], [5, 2, 4]]  # of different lengths, one of a single token


@dataclass(frozen=True)
class Guidance:
    """The settings of a sampler and of its call that decide about the law."""

    weighting: str = "entropy"
    threshold: float = 1.5
    max_weight: float = 1.0
    temperature: float = 1.0
    first_token_from_expert: bool = False
    vocab_size: int = 7
    expert_vocab_size: int | None = None  # where the expert has fewer tokens

    def weight(self, entropy: Tensor, position: int) -> Tensor:
        if self.first_token_from_expert and position == 0:
            return torch.ones_like(entropy)
        if self.weighting == "constant":
            return torch.full_like(entropy, self.max_weight)
        if self.weighting == "hard_gate":
            return self.max_weight * (entropy >= self.threshold).double()
        return (entropy / self.threshold).clamp(max=self.max_weight)

    def sampler(self, kind: int | str | None, policy, expert, **kwargs):
        """Of this law: "stepwise", "coin", or speculative with this draft length (None: chosen by measurement)."""
        kwargs = {
            "weighting": self.weighting,
            "max_weight": self.max_weight,
            "first_token_from_expert": self.first_token_from_expert,
            **kwargs,
        }
        if self.expert_vocab_size is not None:
            kwargs |= {"vocab_size": self.expert_vocab_size, "policy_vocab_size": self.vocab_size}
        if kind in WITHOUT_DRAFTS:
            return WITHOUT_DRAFTS[kind](policy, expert, **kwargs)
        return SpeculativeSampler(policy, expert, draft_length=kind, **kwargs)

    def sample(self, kind, policy, expert, prompts, length: int, eos=(), is_guided=None, **kwargs) -> GuidedRollout:
        return self.sampler(kind, policy, expert, **kwargs).sample(
            prompts,
            entropy_threshold=self.threshold,
            max_completion_length=length,
            eos_token_ids=eos,
            temperature=self.temperature,
            is_guided=is_guided,
        )


@torch.no_grad()
def fresh_probs(model, texts: list[list[int]], guidance: Guidance, vocab_size: int | None = None) -> Tensor:
    """The laws after every token of texts of one length: (texts, tokens, vocab). Ids from `vocab_size` on have probability 0."""
    logits = model(input_ids=torch.tensor(texts), use_cache=False).logits[..., : guidance.vocab_size].double()
    logits[..., guidance.vocab_size if vocab_size is None else vocab_size :] = -torch.inf
    return (logits / guidance.temperature).softmax(-1)


def fresh_laws(policy, expert, texts: list[list[int]], guidance: Guidance) -> tuple[Tensor, Tensor]:
    """Those of both models."""
    size = guidance.vocab_size if guidance.expert_vocab_size is None else guidance.expert_vocab_size
    return fresh_probs(policy, texts, guidance), fresh_probs(expert, texts, guidance, size)


def entropy_of(probs: Tensor) -> Tensor:
    return -(probs * probs.clamp(min=1e-300).log()).sum(-1)


def enumerated_law(policy, expert, prompt, length: int, eos, guidance: Guidance) -> dict[tuple[int, ...], float]:
    """The probability under pi_mix of each completion of at most `length` tokens."""
    law, alive = {}, {(): 1.0}
    for position in range(length):
        texts = [[*prompt, *prefix] for prefix in alive]
        p, e = (law[:, -1] for law in fresh_laws(policy, expert, texts, guidance))
        w = guidance.weight(entropy_of(p), position)[:, None]
        mixed = ((1 - w) * p + w * e).tolist()
        grown = {
            (*prefix, token): chance * mixed[row][token]
            for (row, (prefix, chance)), token in product(enumerate(alive.items()), range(guidance.vocab_size))
        }
        ended = {y: chance for y, chance in grown.items() if y[-1] in eos or len(y) == length}
        law |= ended
        alive = {y: chance for y, chance in grown.items() if y not in ended}
    assert abs(sum(law.values()) - 1) < 1e-9
    return law


@dataclass
class Record:
    """What should have been recorded for one row: one entry per completion token."""

    mixed_logps: Tensor
    policy_logps: Tensor
    weights: Tensor
    entropies: Tensor
    rejected: Tensor  # w TV(p, e)


def expected_record(policy, expert, prompt, completion, guidance: Guidance) -> Record:
    text = [[*prompt, *completion]]
    start = len(prompt) - 1
    p, e = (law[0, start:-1] for law in fresh_laws(policy, expert, text, guidance))
    entropies = entropy_of(p)
    w = torch.stack([guidance.weight(h, position) for position, h in enumerate(entropies)])
    token = torch.tensor(completion)[:, None]
    p_y, e_y = p.gather(1, token)[:, 0], e.gather(1, token)[:, 0]
    total_variation = 0.5 * (p - e).abs().sum(-1)
    return Record(((1 - w) * p_y + w * e_y).log(), p_y.log(), w, entropies, w * total_variation)


def assert_recorded(rollout: GuidedRollout, policy, expert, prompts, guidance: Guidance, tolerance: float = 2e-4):
    """Every number of the record is that of a fresh forward of the row by itself."""
    for row, (prompt, completion) in enumerate(zip(prompts, rollout.completion_ids, strict=True)):
        expected = expected_record(policy, expert, prompt, completion, guidance)
        for ours, theirs in [
            (rollout.sampling_per_token_logps[row], expected.mixed_logps),
            (rollout.policy_per_token_logps[row], expected.policy_logps),
            (rollout.guidance_weights[row], expected.weights),
            (rollout.entropies[row], expected.entropies),
        ]:
            torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs, rtol=0, atol=tolerance)
