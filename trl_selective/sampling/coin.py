"""Guidance by a coin: the policy alone decides where the expert speaks, and the expert reads only then."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trl_selective.functional.mixed_policy import entropy, finite_log, probability_of
from trl_selective.sampling.draw import ACCEPT, DRAFT, REPLACE, inverse_cdf
from trl_selective.sampling.live_rows import LiveRows
from trl_selective.sampling.sampler import GuidedSampler

MAX_BACKLOG = (
    32  # tokens that the expert may be behind where it owes probabilities: its logits for all of them are held at once
)


class CoinSampler(GuidedSampler):
    """Draws from pi_mix by flipping a coin for every token: heads with probability w, then the expert draws it, else the policy does.

    By total probability the token has the law (1 - w) pi_theta + w pi*. Since w depends on the policy alone, the expert is needed only where
    a coin shows heads. It then reads, in one forward (token by token if it has recurrent layers), what was written since it was last asked. No
    token is ever taken back, so that any cache will do; and the policy reads every token once.

    Terms, beside those of `GuidedSampler`:
        heads: the coin gives this position to the expert.
        owed: what is missing to log pi_mix of a token with w > 0 that the policy drew: the expert's probability of it.
        due: a row that owes, and ends here or is `MAX_BACKLOG` tokens behind.

    All rows keep step: one row that shows heads, or is due, makes the expert read for all. It is asked in a share 1 - (1 - w)^rows of the
    steps, and once more where a row ends, since log pi_mix of the tokens of the policy needs its probabilities too; at the latest after
    `MAX_BACKLOG` tokens.

    `expert_drawn` follows the law that drafting would give it, as a share (1 - pi_theta / pi*)+ of the tokens that the expert drew.
    """

    def _advance(self, live: LiveRows, entropy_threshold: float, temperature: float) -> None:
        positions = live.positions(1)
        policy = self._probs(live.read_by_policy(), temperature)
        entropies = entropy(policy)
        weight = self._weight(live, entropies, entropy_threshold, positions)
        token = inverse_cdf(policy, live.noise(positions, DRAFT))
        is_heads = live.noise(positions, ACCEPT) < weight

        num_rows = len(live)
        backlog = positions - torch.arange(live.backlog.shape[1], 0, -1, device=positions.device)
        is_owed = torch.cat([live.recorded("guidance_weights", backlog), weight], dim=1) > 0
        is_late = live.backlog.shape[1] >= MAX_BACKLOG
        is_due = (live.ends(token, positions).squeeze(1) | is_late) & is_owed.any(1)
        reads = bool((is_heads.squeeze(1) | is_due).any())
        if reads:
            first = int(is_owed.any(0).int().argmax())  # before, w is 0 in all rows, and no logits are needed
            *earlier, here = live.read_by_expert(live.pending[:, :0], is_owed.shape[1] - first).split(1, dim=1)
            self._pay(live, earlier, temperature)
            expert = self._expert_probs(here, policy, temperature)
            token = torch.where(is_heads, inverse_cdf(expert, live.noise(positions, REPLACE)), token)

        policy_prob = probability_of(token, policy)
        policy_logp = finite_log(policy_prob)
        logp = policy_logp  # until it is paid, or for good where w is 0
        expert_drawn = torch.zeros_like(is_heads)
        if reads:
            expert_prob = probability_of(token, expert)
            logp = ((1 - weight) * policy_prob + weight * expert_prob).log()
            # The draft was not used where the coin shows heads, so that its number is free.
            expert_drawn = is_heads & (live.noise(positions, DRAFT) < 1 - policy_prob / expert_prob)
        live.commit(
            torch.ones_like(live.position),
            token,
            sampling_per_token_logps=logp,
            policy_per_token_logps=policy_logp,
            guidance_weights=weight,
            entropies=entropies,
            expert_drawn=expert_drawn,
        )
        if reads and len(live) < num_rows:
            live.repack()

    def _pay(self, live: LiveRows, logits: Sequence[Tensor], temperature: float) -> None:
        """Record log pi_mix of the last tokens drawn, which the policy drew without asking, now that the expert has logits for them."""
        for distance, each in enumerate(reversed(logits), start=1):  # one position at a time: vocabularies are large
            at = live.positions(1)[: live.num_guided] - distance
            token, weight, policy_logp = (
                live.recorded(name, at) for name in ("completion_ids", "guidance_weights", "policy_per_token_logps")
            )
            expert_prob = probability_of(token, self._expert_law(each, temperature))
            mixed = (1 - weight) * policy_logp.exp() + weight * expert_prob
            live.amend("sampling_per_token_logps", at, mixed.log())
