"""MENTOR's Algorithm 1 for a batch: the policy drafts, the expert verifies all drafts in one forward."""

import time

import torch
from torch import Tensor

from trl_selective.functional.mixed_policy import acceptance_probability, entropy, probability_of, residual
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
                    "cache, which cannot take rejected tokens back. Use guided_sampler='coin', which never takes any back."
                )
        if (draft_length is not None and draft_length < 1) or max_draft_length < 1:
            raise ValueError(
                f"draft_length and max_draft_length must be at least 1, got {draft_length} and {max_draft_length}."
            )
        self.draft_length = draft_length
        self.lookahead = Lookahead(max_draft_length)

    def _advance(self, live: LiveRows, entropy_threshold: float, temperature: float) -> None:
        started, num_prepared = self._clock(), live.num_prepared
        drafts, policy_logits, entropies, weight, at_stake = self._draft(live, entropy_threshold, temperature)
        num = drafts.shape[1]
        drafted = self._clock()
        expert_logits = live.read_by_expert(drafts[:, :-1], num_logits=num)

        is_tested, is_replaced, tokens, policy_prob, expert_prob = self._judge(
            live, drafts, policy_logits, expert_logits, weight, temperature
        )
        num_rows, is_observed = len(live), self.draft_length is None and live.num_guided > 0
        live.num_drafted += live.num_guided * num
        live.commit(
            is_tested.sum(1),
            tokens,
            sampling_per_token_logps=((1 - weight) * policy_prob + weight * expert_prob).log(),
            policy_per_token_logps=policy_prob.clamp(min=torch.finfo(policy_prob.dtype).tiny).log(),
            guidance_weights=weight,
            entropies=entropies,
            expert_drawn=is_replaced,
        )
        live.repack()
        if is_observed and live.num_prepared == num_prepared:
            self.lookahead.observe(
                num,
                is_tested.sum().item() / num_rows,
                num_at_stake=int((at_stake & is_tested).sum()),
                num_rejected=int(is_replaced.sum()),
                policy_seconds=drafted - started,
                rest_seconds=self._clock() - drafted,
            )

    def _judge(
        self,
        live: LiveRows,
        drafts: Tensor,
        policy_logits: Tensor,
        expert_logits: Tensor,
        weight: Tensor,
        temperature: float,
    ) -> tuple[Tensor, ...]:
        """Accept the drafts of each row up to the first that is rejected, and replace that one.

        Returns:
            All (live, drafts): whether a draft was tested; whether it was replaced; the token that stands in its place, and its probability
            under either model.
        """
        found = []
        for at in range(drafts.shape[1]):  # not all at once: over large vocabularies their laws would take gigabytes
            draft, here = drafts[:, at : at + 1], slice(at, at + 1)
            policy = self._probs(policy_logits[:, here], temperature)
            expert = self._expert_probs(expert_logits[:, here], policy, temperature)
            acceptance = acceptance_probability(policy, expert, weight[:, here], draft)
            found.append((acceptance, probability_of(draft, policy), probability_of(draft, expert)))
        acceptance, policy_prob, expert_prob = (torch.cat(part, dim=1) for part in zip(*found, strict=True))
        positions = live.positions(drafts.shape[1])
        is_rejected = live.noise(positions, ACCEPT) >= acceptance
        is_tested = is_rejected.cumsum(1) <= is_rejected
        is_replaced = is_rejected & is_tested
        tokens = drafts.clone()
        place = is_replaced.nonzero(as_tuple=True)  # one in a row at most, and in guided rows alone
        if len(place[0]):
            policy, expert = (self._probs(logits[place], temperature) for logits in (policy_logits, expert_logits))
            token = inverse_cdf(residual(policy, expert), live.noise(positions, REPLACE)[place])
            tokens[place] = token
            policy_prob[place], expert_prob[place] = probability_of(token, policy), probability_of(token, expert)
        return is_tested, is_replaced, tokens, policy_prob, expert_prob

    def _draft(self, live: LiveRows, entropy_threshold: float, temperature: float) -> tuple[Tensor, ...]:
        """Drafts for the next positions of each row: the tokens, the logits of the laws they were drawn from, the entropies and weights, and
        which of them are at stake. All (live, drafts), the logits with the vocabulary behind."""
        reach = torch.ones_like(live.pending, dtype=torch.float)  # the chance of each row to get to the next position
        token, (mask, position_ids) = live.pending, live.context.extended(torch.ones_like(live.pending))
        limit = min(self.draft_length or self.lookahead.max_length, live.tokens_left)
        found: list[tuple[Tensor, ...]] = []
        while True:
            positions = live.positions(len(found) + 1)[:, -1:]
            logits = live.draft_by_policy(token, mask, position_ids)
            law = self._probs(logits, temperature)
            token = inverse_cdf(law, live.noise(positions, DRAFT))
            entropies = entropy(law)
            weight = self._weight(live, entropies, entropy_threshold, positions)
            at_stake = live.noise(positions, ACCEPT) >= 1 - weight
            found.append((token, logits, entropies, weight, at_stake))
            if len(found) == limit:
                break
            if self.draft_length is None:
                reach = torch.where(at_stake, (1 - self.lookahead.risk) * reach, reach)
                reach = reach.masked_fill(live.ends(token, positions), 0)
                if not self.lookahead.goes_on(len(found), reach.mean().item()):
                    break
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            position_ids = live.context.next_position(position_ids)
        return tuple(torch.cat(parts, dim=1) for parts in zip(*found, strict=True))

    def _clock(self) -> float:
        """Seconds, once all work given to the device is done; only a chosen draft length needs to know."""
        if self.draft_length is None and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
