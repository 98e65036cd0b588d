"""MENTOR's Algorithm 1 for a batch: the policy drafts, the expert verifies all drafts in one forward."""

import time
from collections import defaultdict

import torch
from torch import Tensor

from trl_selective.functional.mixed_policy import acceptance, entropy, finite_log, probability_of, residual
from trl_selective.sampling.draw import ACCEPT, DRAFT, REPLACE, inverse_cdf
from trl_selective.sampling.kv import can_forget_tokens
from trl_selective.sampling.live_rows import LiveRows
from trl_selective.sampling.lookahead import Lookahead
from trl_selective.sampling.sampler import GuidedSampler

MAX_PROBS = 2**25  # numbers in the laws of the expert that are held at once


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

    Raises:
        ValueError: as `GuidedSampler`, and for models that cannot take rejected tokens back.
    """

    def __init__(self, policy, expert, *, draft_length: int | None = None, max_draft_length: int = 16, **kwargs):
        super().__init__(policy, expert, **kwargs)
        for name, model in {"policy": policy, "expert": expert}.items():
            if not can_forget_tokens(model.config):
                raise ValueError(
                    f"The {name} ({type(model).__name__}) has sliding-window or recurrent layers, or counts distances in columns of its "
                    "cache, which cannot take rejected tokens back. Use guided_sampler='coin', which never takes any back."
                )
        if (draft_length is not None and draft_length < 1) or max_draft_length < 1:
            raise ValueError(
                f"draft_length and max_draft_length must be at least 1, got {draft_length} and {max_draft_length}."
            )
        self.draft_length = draft_length
        self._lookaheads = defaultdict[int, Lookahead](lambda: Lookahead(max_draft_length))

    def lookahead(self, num_rows: int) -> Lookahead:
        """What was learned from rounds of about as many rows: to a power of 2, since a few rows take other times than many."""
        return self._lookaheads[num_rows.bit_length()]

    def _advance(self, live: LiveRows, entropy_threshold: float, temperature: float) -> None:
        num_prepared, is_observed = live.num_prepared, self.draft_length is None and live.num_guided > 0
        # To ask for the tokens left is to wait for the device, as with the counts at the end of the round: its time is the device's.
        num_left = live.tokens_left
        started = time.perf_counter()
        lookahead = self.lookahead(len(live))
        num = min(self.draft_length or lookahead.next_length(num_left), num_left)
        drafts, policy_logits, policy_prob, entropies, weight, expert_logits = self._draft(
            live, num, entropy_threshold, temperature
        )
        is_tested, is_replaced, tokens, policy_prob, expert_prob = self._judge(
            live, drafts, policy_logits, policy_prob, expert_logits, weight, temperature
        )
        live.num_drafted += live.num_guided * num
        live.commit(
            is_tested.sum(1),
            tokens,
            sampling_per_token_logps=((1 - weight) * policy_prob + weight * expert_prob).log(),
            policy_per_token_logps=finite_log(policy_prob),
            guidance_weights=weight,
            entropies=entropies,
            expert_drawn=is_replaced,
        )
        live.repack()
        if is_observed and live.num_prepared == num_prepared:
            num_tested, num_rejected = torch.stack([is_tested.sum(), is_replaced.sum()]).tolist()
            seconds = time.perf_counter() - started
            lookahead.observe(num, num_tested=num_tested, num_rejected=num_rejected, seconds=seconds)

    def _judge(
        self,
        live: LiveRows,
        drafts: Tensor,
        policy_logits: Tensor,
        policy_prob: Tensor,
        expert_logits: Tensor,
        weight: Tensor,
        temperature: float,
    ) -> tuple[Tensor, ...]:
        """Accept the drafts of each row up to the first that is rejected, and replace that one.

        Returns:
            All (live, drafts): whether a draft was tested; whether it was replaced; the token that stands in its place, and its probability
            under either model.
        """
        guided = slice(live.num_guided)
        expert_prob, tokens = policy_prob.clone(), drafts.clone()
        expert_prob[guided] = self._draft_probs(drafts[guided], expert_logits, temperature)
        positions = live.positions(drafts.shape[1])
        is_rejected = live.noise(positions, ACCEPT) >= acceptance(policy_prob, expert_prob, weight)
        is_tested = is_rejected.cumsum(1) <= is_rejected
        is_replaced = is_rejected & is_tested
        # All guided rows get a replacement, needed or not: to ask which of them do would be to wait for the device.
        if live.num_guided:
            first = is_replaced[guided].int().argmax(1, keepdim=True)
            rows = torch.arange(live.num_guided, device=first.device)[:, None]
            policy = self._probs(policy_logits[rows, first], temperature)
            expert = self._expert_law(expert_logits[rows, first], temperature)
            token = inverse_cdf(residual(policy, expert), live.noise(positions, REPLACE)[guided].gather(1, first))
            for values, replacement in (
                (tokens, token),
                (policy_prob, probability_of(token, policy)),
                (expert_prob, probability_of(token, expert)),
            ):
                values[guided] = torch.where(is_replaced[guided], replacement, values[guided])
        return is_tested, is_replaced, tokens, policy_prob, expert_prob

    def _draft_probs(self, drafts: Tensor, logits: Tensor, temperature: float) -> Tensor:
        """The expert's probabilities of drafts, of a few at a time: all laws at once would take gigabytes over large vocabularies."""
        num = max(1, MAX_PROBS // max(1, logits[:, 0].numel()))
        parts = zip(drafts.split(num, dim=1), logits.split(num, dim=1), strict=True)
        return torch.cat([probability_of(part, self._expert_law(law, temperature)) for part, law in parts], dim=1)

    def _draft(self, live: LiveRows, num: int, entropy_threshold: float, temperature: float) -> tuple[Tensor, ...]:
        """Drafts for the next `num` positions of each row, and what the expert says there.

        Returns:
            (live, num): the tokens; the logits of the laws they were drawn from, with the vocabulary behind; their probabilities; the entropies;
            the weights. And the expert's logits, of guided rows: it needs all drafts but the last, and reads them while the policy reads the
            last of these.
        """
        positions = live.positions(num)
        noise = live.noise(positions, DRAFT)
        token, (mask, position_ids) = live.pending, live.context.extended(torch.ones_like(live.pending))
        found: list[tuple[Tensor, ...]] = []
        for at in range(num):
            if at:
                mask = torch.cat([mask, torch.ones_like(token)], dim=1)
                position_ids = live.context.next_position(position_ids)
            block = token, mask, position_ids
            if at < num - 1:
                logits = live.draft_by_policy(*block)
            else:
                drafts = torch.cat([live.pending[:, :0], *(drafted for drafted, *_ in found)], dim=1)
                logits, expert_logits = live.read_by_both(*block, drafts, num_logits=num)
            law = self._probs(logits, temperature)
            token = inverse_cdf(law, noise[:, at : at + 1])
            entropies = entropy(law)
            weight = self._weight(live, entropies, entropy_threshold, positions[:, at : at + 1])
            found.append((token, logits, probability_of(token, law), entropies, weight))
        return *(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)), expert_logits
