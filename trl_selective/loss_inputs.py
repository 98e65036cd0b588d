"""What the loss of a micro-batch takes from the probabilities that the policy gives now. Knows nothing of TRL but the keys of its batches, to
which the trainer adds `is_guided`, `is_injected` and `behaviour_per_token_logps`.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trl_selective.functional.importance import injected_importance_weight
from trl_selective.functional.thresholds import EntropyHistogram


class LossSums(NamedTuple):
    """What is added up over a micro-batch, over the processes, and over the micro-batches of an update: ratios of sums do not depend on how a
    batch is cut.

    Attributes:
        num_invalid: rows to which the policy gives no finite log-probability, or no entropy where that is needed.
        entropy, num_on_policy: nats and number of the tokens of on-policy rows.
        logp, num_injected: log-probabilities and number of the tokens of injected rows.
        injected_advantage, advantage: sizes of the weighted advantages of the tokens of injected rows, and of all.
    """

    num_invalid: float = 0.0
    entropy: float = 0.0
    num_on_policy: float = 0.0
    logp: float = 0.0
    num_injected: float = 0.0
    injected_advantage: float = 0.0
    advantage: float = 0.0

    def plus(self, other: "LossSums") -> "LossSums":
        """The sums of both."""
        return LossSums(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))

    @property
    def mean_entropy(self) -> float:
        """Of on-policy tokens, nats; NaN where there are none."""
        return _ratio(self.entropy, self.num_on_policy)

    @property
    def injected_metrics(self) -> dict[str, float]:
        """Mean log-probability of injected tokens, and their share of the gradient. NaN where there is nothing to divide by."""
        return {
            "guidance/injection/logp": _ratio(self.logp, self.num_injected),
            "guidance/injection/gradient_share": _ratio(self.injected_advantage, self.advantage),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def bind_to_policy(
    inputs: dict,
    logps: Float[Tensor, "batch seq"],
    entropies: Float[Tensor, "batch seq"],
    *,
    histogram: EntropyHistogram | None,
    needs_entropies: bool,
    correction: str,
    gamma: float,
    max_ratio: float,
) -> Float[Tensor, "sums"]:
    """Complete `inputs` between the forward of a loss and the loss: what the loss reads of injected rows, and which rows have finite
    probabilities. Returns their `LossSums`, in the order of its fields.

    Injected rows get advantages with the importance weight of each token, and a ratio of 1 in every iteration: the clip never acts, and the
    gradient is that of the written objective.

    Args:
        inputs: the micro-batch, changed in place.
        logps, entropies: of its tokens under the policy, without gradient; nats.
        histogram: gets the entropies of on-policy tokens; None if nothing is guided.
        needs_entropies: whether they must be finite.
        correction, gamma, max_ratio: of injected tokens, as for `injected_importance_weight`.
    """
    mask = inputs["completion_mask"].bool()
    nobody = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    is_injected = inputs.get("is_injected", nobody).unsqueeze(1)
    on_policy = mask & ~is_injected & ~inputs.get("is_guided", nobody).unsqueeze(1)
    is_finite = logps.isfinite()
    if histogram is not None:
        histogram.update(entropies, on_policy)
    if needs_entropies:
        is_finite &= entropies.isfinite()
    inputs["is_finite"] = (is_finite | ~mask).all(dim=1)
    old, tokens = inputs.get("old_per_token_logps", logps), mask & is_injected
    if "is_injected" in inputs:
        behaviour_logps = inputs.get("behaviour_per_token_logps")
        weights = injected_importance_weight(
            logps, behaviour_logps, tokens, correction, gamma=gamma, max_ratio=max_ratio
        )
        advantages = inputs["advantages"]
        advantages = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
        inputs["advantages"] = advantages * torch.where(is_injected, weights, 1.0)
        inputs["old_per_token_logps"] = torch.where(is_injected, logps, old)
    size = inputs["advantages"].abs().double()
    size = (size if size.dim() == 2 else size.unsqueeze(1)).expand_as(mask)
    sums = {
        "num_invalid": (~inputs["is_finite"]).sum(),
        "entropy": entropies[on_policy].double().sum(),
        "num_on_policy": on_policy.sum(),
        "logp": old[tokens].double().sum(),
        "num_injected": tokens.sum(),
        "injected_advantage": size[tokens].sum(),
        "advantage": size[mask].sum(),
    }
    return torch.stack([sums[name].double() for name in LossSums._fields])
