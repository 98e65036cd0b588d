"""MENTOR's Algorithm 1 for a batch: the policy drafts, the expert verifies all drafts in one forward."""

import time

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trl_selective.functional.mixed_policy import acceptance_probability, entropy, residual
from trl_selective.sampling.draw import ACCEPT, DRAFT, REPLACE, inverse_cdf
from trl_selective.sampling.kv import can_forget_tokens
from trl_selective.sampling.live_rows import LiveRows
from trl_selective.sampling.lookahead import Lookahead
from trl_selective.sampling.sampler import GuidedSampler


class SpeculativeSampler(GuidedSampler):
    """Draws from pi_mix by drafting from the policy and correcting with the expert (arXiv:2510.04140, Algorithm 1).

    Terms, beside those of `GuidedSampler`:
        draft: a token drawn from the policy alone.
        accepted: a draft that stands, with probability min(1, pi_mix / pi_theta) (Eq. 7). Drafts are judged in order; the first one that
            is rejected ends the round, and the drafts behind it are dropped.
        replacement: the token drawn from the residual (Eq. 8) in place of the rejected draft.

    A round of K drafts takes K policy forwards of one token and one expert forward of K tokens, and commits 1 to K tokens per row. There is
    no bonus token after K accepted drafts: its law would need one more policy forward, which the next round makes anyway.

    Args:
        draft_length: K, or None to choose it by measurement (`Lookahead`).
        max_draft_length: upper bound of a chosen K.
        kwargs: as for `GuidedSampler`.
    """

    def __init__(self, policy, expert, *, draft_length: int | None = None, max_draft_length: int = 16, **kwargs):
        super().__init__(policy, expert, **kwargs)
        for name, model in {"policy": policy, "expert": expert}.items():
            if not can_forget_tokens(model.config):
                raise ValueError(
                    f"The {name} ({type(model).__name__}) has sliding-window or recurrent layers, or counts distances in columns of its "
                    "cache, which cannot take rejected tokens back. Use guided_sampler='stepwise', which never takes any back."
                )
        if (draft_length is not None and draft_length < 1) or max_draft_length < 1:
            raise ValueError(
                f"draft_length and max_draft_length must be at least 1, got {draft_length} and {max_draft_length}."
            )
        self.draft_length = draft_length
        self.lookahead = Lookahead(max_draft_length)

    def _advance(self, live: LiveRows, entropy_threshold: float, temperature: float) -> None:
        num = min(self.draft_length or self.lookahead.length(), live.tokens_left)
        positions = live.positions(num)
        is_first_round = live.context.mask.shape[1] == 0

        started = self._clock()
        drafts, policy = self._draft(live, positions, temperature)
        drafted = self._clock()
        block = torch.cat([live.pending, drafts[:, :-1]], dim=1)
        block_mask = torch.cat([live.pending_mask, torch.ones_like(drafts[:, :-1])], dim=1)
        expert = self._probs(live.read(live.expert, block, block_mask, num_logits=num), temperature)
        verified = self._clock()

        entropies = entropy(policy)
        weight = self._weight(entropies, entropy_threshold, positions)
        accepted = live.noise(positions, ACCEPT) < acceptance_probability(policy, expert, weight, drafts)
        num_accepted = accepted.long().cumprod(1).sum(1, keepdim=True)
        at = num_accepted.clamp(max=num - 1)  # the first rejected draft; where all were accepted, nothing is replaced
        at_row = at.unsqueeze(-1).expand(-1, -1, self.vocab_size)
        replacement = inverse_cdf(
            residual(policy.gather(1, at_row), expert.gather(1, at_row)), live.noise(positions.gather(1, at), REPLACE)
        )
        is_replaced = torch.arange(num, device=at.device) == num_accepted
        tokens = torch.where(is_replaced, replacement, drafts)

        policy_prob, expert_prob = (p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) for p in (policy, expert))
        live.num_drafted += drafts.numel()
        # The first round reads the prompts: no measure of a forward.
        if self.draft_length is None and not is_first_round:
            tested = int((num_accepted + 1).clamp(max=num).sum())
            self.lookahead.observe(num, tested, int(num_accepted.sum()), drafted - started, verified - drafted)
        live.commit(
            (num_accepted.squeeze(1) + 1).clamp(max=num),
            tokens,
            sampling_per_token_logps=((1 - weight) * policy_prob + weight * expert_prob).log(),
            policy_per_token_logps=policy_prob.clamp(min=torch.finfo(policy_prob.dtype).tiny).log(),
            guidance_weights=weight,
            entropies=entropies,
            expert_drawn=is_replaced,
        )
        live.repack()

    def _draft(
        self, live: LiveRows, positions: Int[Tensor, "live num"], temperature: float
    ) -> tuple[Int[Tensor, "live num"], Float[Tensor, "live num vocab"]]:
        """A token from the policy for each position, and the distributions they were drawn from."""
        block, mask, position_ids = live.pending, *live.context.extended(live.pending_mask)
        noise = live.noise(positions, DRAFT)
        drafts, laws = [], []
        for i in range(positions.shape[1]):
            law = self._probs(live.policy.read(block, mask, position_ids, num_logits=1), temperature)
            block = inverse_cdf(law, noise[:, i : i + 1])
            mask = torch.cat([mask, torch.ones_like(block)], dim=1)
            position_ids = live.context.next_position(position_ids)
            drafts.append(block)
            laws.append(law)
        return torch.cat(drafts, dim=1), torch.cat(laws, dim=1)

    def _clock(self) -> float:
        """Seconds, once all work given to the device is done; only a chosen draft length needs to know."""
        if self.draft_length is None and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
