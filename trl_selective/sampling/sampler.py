"""What the samplers share: their contract, and the laws of a position."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from trl_selective.functional.mixed_policy import WEIGHTINGS, Weighting, token_probs
from trl_selective.rollout import GuidedRollout
from trl_selective.sampling.kv import has_attention
from trl_selective.sampling.live_rows import LiveRows


class GuidedSampler(ABC):
    """Draws completions from pi_mix = (1 - w_t) pi_theta + w_t pi* (arXiv:2510.04140, Eq. 6).

    Terms:
        policy, expert: causal language models of one tokenizer. Their heads may be padded to different sizes: distributions are taken over
            the ids that are tokens. The caller sets train or eval mode; nothing is changed here.
        position: index of a completion token within its row, from 0.
        pending: tokens of a row that neither model has read: the prompt at first, then the last token drawn.
        block: what a model reads in one forward: the pending tokens, and drafts.

    Args:
        policy: gives pi_theta, and with it H_t and w_t.
        expert: gives pi*; None for a sampler that has it from elsewhere.
        weighting: how w follows from entropy, threshold and `max_weight`: "entropy" (the paper), "hard_gate", "constant", or a function of
            these three.
        max_weight: upper bound of w, in [0, 1].
        vocab_size: ids from here on have pi* = 0, as those that the expert's tokenizer lacks; None for all that both heads have.
        policy_vocab_size: ids from here on are never drawn; None for `vocab_size`. The expert must be able to read all others.
        pad_token_id: any valid id, for padding.
        first_token_from_expert: draw the first token of every completion from the expert alone, as the paper's released code does.

    Raises:
        ValueError: for settings out of range, and for models whose cache cannot be used.
    """

    def __init__(
        self,
        policy: nn.Module,
        expert: nn.Module | None,
        *,
        weighting: str | Weighting = "entropy",
        max_weight: float = 1.0,
        vocab_size: int | None = None,
        policy_vocab_size: int | None = None,
        pad_token_id: int = 0,
        first_token_from_expert: bool = False,
    ):
        if isinstance(weighting, str) and weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {sorted(WEIGHTINGS)} or a function, got {weighting!r}.")
        if not 0 <= max_weight <= 1:
            raise ValueError(f"max_weight must lie in [0, 1], got {max_weight}.")
        for name, model in {"policy": policy, "expert": expert}.items():
            adapter = getattr(model, "active_peft_config", None)
            if adapter is not None and adapter.is_prompt_learning:
                raise ValueError(
                    f"The {name} has a {type(adapter).__name__} adapter, whose virtual tokens replace the cache that guided sampling needs. "
                    "Use an adapter that changes weights, such as LoRA."
                )
            if getattr(adapter, "alora_invocation_tokens", None):
                raise ValueError(
                    f"The {name} has an adapter with alora_invocation_tokens, which it looks for in whole texts, but guided sampling reads them block "
                    "by block: the adapter would be off. Use LoRA without invocation tokens."
                )
            if model is not None and not has_attention(model.config):
                raise ValueError(
                    f"The {name} ({type(model).__name__}) has recurrent layers alone, but guided sampling needs a cache that attention fills. Use "
                    "a model with attention, or with both."
                )
        self.policy, self.expert = policy, expert
        self.weighting = WEIGHTINGS[weighting] if isinstance(weighting, str) else weighting
        self.max_weight = max_weight
        models = [policy] if expert is None else [policy, expert]
        heads = [model.config.get_text_config().vocab_size for model in models]  # type: ignore[operator, union-attr]
        self.vocab_size = min(*heads, vocab_size or heads[0])
        self.policy_vocab_size = min(heads[0], max(self.vocab_size, policy_vocab_size or 0))
        self.pad_token_id = pad_token_id
        self.first_token_from_expert = first_token_from_expert

    @torch.no_grad()
    def sample(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        entropy_threshold: float,
        max_completion_length: int,
        eos_token_ids: Collection[int],
        temperature: float = 1.0,
        is_guided: Sequence[bool] | None = None,
    ) -> GuidedRollout:
        """Draw one completion for each prompt.

        Args:
            prompt_ids: token ids of each prompt, without padding, at least one each.
            entropy_threshold: gamma_p >= 0 in nats.
            max_completion_length: tokens after which a completion ends at the latest, at least 1.
            eos_token_ids: a completion ends with the first of these, which is part of it.
            temperature: > 0, divides the logits of both models.
            is_guided: which rows are; None for all. The others are drawn from the policy alone (w = 0). The expert does not read them, and
                forwards and drafts of theirs are not counted.

        Raises:
            ValueError: for arguments out of range, and if a model returns a distribution that is not finite.
        """
        check_request(prompt_ids, entropy_threshold, max_completion_length, temperature)
        is_guided = [True] * len(prompt_ids) if is_guided is None else is_guided
        if len(is_guided) != len(prompt_ids):
            raise ValueError(
                f"is_guided must have one entry per prompt, got {len(is_guided)} for {len(prompt_ids)} prompts."
            )
        live = LiveRows(
            self.policy,
            self.expert,
            prompt_ids,
            self.pad_token_id,
            max_completion_length,
            eos_token_ids,
            is_guided,
        )
        step = partial(self._advance, live, entropy_threshold, temperature)
        while not live.are_done:
            live.advance(step)
        return live.to_rollout()

    @abstractmethod
    def _advance(self, live: LiveRows, entropy_threshold: float, temperature: float) -> None:
        """Draw at least one more token for every live row and commit it."""

    def _probs(self, logits: Float[Tensor, "*batch head"], temperature: float) -> Float[Tensor, "*batch vocab"]:
        """The policy's probabilities over the ids that may be drawn."""
        return token_probs(logits[..., : self.policy_vocab_size], temperature)

    def _expert_law(self, logits: Float[Tensor, "*batch head"], temperature: float) -> Float[Tensor, "*batch vocab"]:
        """The expert's probabilities over the same ids: 0 where they are none of its own."""
        law = token_probs(logits[..., : self.vocab_size], temperature)
        missing = self.policy_vocab_size - self.vocab_size
        return pad(law, (0, missing)) if missing else law

    def _expert_probs(
        self,
        logits: Float[Tensor, "guided positions head"],
        policy: Float[Tensor, "rows positions vocab"],
        temperature: float,
    ) -> Float[Tensor, "rows positions vocab"]:
        """The expert's law in guided rows. In the others, which have w = 0, the policy's stands in for it."""
        if len(logits) == len(policy):
            return self._expert_law(logits, temperature)
        return torch.cat([self._expert_law(logits, temperature), policy[len(logits) :]]) if len(logits) else policy

    def _weight(
        self,
        live: LiveRows,
        entropies: Float[Tensor, "rows positions"],
        entropy_threshold: float,
        positions: Int[Tensor, "rows positions"],
    ) -> Float[Tensor, "rows positions"]:
        """The guidance weight w of each position."""
        weight = self.weighting(entropies, entropy_threshold, self.max_weight)
        if self.first_token_from_expert:
            weight = torch.where(positions == 0, 1.0, weight)
        return weight if live.num_guided == len(live) else weight * live.is_guided


def check_request(
    prompt_ids: Sequence[Sequence[int]], entropy_threshold: float, max_completion_length: int, temperature: float
) -> None:
    """Refuse arguments of `sample` that are out of range.

    Raises:
        ValueError: naming them.
    """
    empty = [row for row, prompt in enumerate(prompt_ids) if not len(prompt)]
    if not len(prompt_ids) or empty:
        raise ValueError(
            f"Expected prompts of at least one token each, got {len(prompt_ids)} prompts, empty ones in rows {empty}."
        )
    if not (temperature > 0 and entropy_threshold >= 0 and max_completion_length >= 1):
        raise ValueError(
            "Expected temperature > 0, entropy_threshold >= 0 and max_completion_length >= 1, got "
            f"{temperature}, {entropy_threshold} and {max_completion_length}."
        )
