"""The reference: both models read every token, and the next one is drawn from the mixture itself."""

import torch

from trl_selective.functional.mixed_policy import entropy, finite_log, mixed_policy, probability_of
from trl_selective.sampling.draw import ACCEPT, DRAFT, inverse_cdf
from trl_selective.sampling.live_rows import LiveRows
from trl_selective.sampling.sampler import GuidedSampler


class StepwiseSampler(GuidedSampler):
    """Draws y_t ~ pi_mix directly, one forward of each model per token. Works with any cache, since nothing is ever taken back.

    `expert_drawn` follows the law that drafting would give it: a token y of the mixture stems from a rejected draft with probability
    (pi_mix(y) - pi_theta(y))+ / pi_mix(y).
    """

    def _advance(self, live: LiveRows, entropy_threshold: float, temperature: float) -> None:
        positions = live.positions(1)
        no_drafts = live.pending[:, :0]
        policy = self._probs(live.read_by_policy(), temperature)
        expert = self._expert_probs(live.read_by_expert(no_drafts, num_logits=1), policy, temperature)
        entropies = entropy(policy)
        weight = self._weight(live, entropies, entropy_threshold, positions)
        mixed = mixed_policy(policy, expert, weight)
        token = inverse_cdf(mixed, live.noise(positions, DRAFT))

        num_rows = len(live)
        mixed_prob, policy_prob = (probability_of(token, law) for law in (mixed, policy))
        live.commit(
            torch.ones_like(live.position),
            token,
            sampling_per_token_logps=mixed_prob.log(),
            policy_per_token_logps=finite_log(policy_prob),
            guidance_weights=weight,
            entropies=entropies,
            expert_drawn=live.noise(positions, ACCEPT) < 1 - policy_prob / mixed_prob,
        )
        if len(live) < num_rows:
            live.repack()  # the row with the longest prompt may have left
