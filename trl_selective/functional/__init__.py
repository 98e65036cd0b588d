"""The mathematics of selective guidance as pure functions: tensors in, tensors out, no model and no trainer.

Axes, used in every signature of the package:

    batch    B   completions (= groups x generations)
    groups       prompts of a batch
    rows         generations of one group
    seq      T   completion tokens
    vocab    V   token ids
    `*batch`     any leading axes, also none

Probabilities are float32 or better: cast logits up before the softmax, not after.
"""

from trl_selective.functional.advantages import (
    guided_advantages,
    is_correct,
    mixed_group_advantages,
    on_policy_advantages,
    reward_span,
    total_reward,
)
from trl_selective.functional.diversity import distinct_n, jaccard, n_grams, pairwise_overlap, pass_at_k
from trl_selective.functional.importance import (
    effective_sample_size,
    guided_importance_weight,
    injected_importance_weight,
    masked_importance_weight,
    policy_shaping_weight,
    sequence_importance_weight,
    truncated_importance_weight,
)
from trl_selective.functional.mixed_policy import (
    acceptance_probability,
    constant_weight,
    entropy,
    guidance_weight,
    hard_gate,
    mixed_policy,
    residual,
)
from trl_selective.functional.schedules import constant, cosine, join, linear
from trl_selective.functional.thresholds import EntropyHistogram

__all__ = [
    "EntropyHistogram",
    "acceptance_probability",
    "constant",
    "constant_weight",
    "cosine",
    "distinct_n",
    "effective_sample_size",
    "entropy",
    "guidance_weight",
    "guided_advantages",
    "guided_importance_weight",
    "hard_gate",
    "injected_importance_weight",
    "is_correct",
    "jaccard",
    "join",
    "linear",
    "masked_importance_weight",
    "mixed_group_advantages",
    "mixed_policy",
    "n_grams",
    "on_policy_advantages",
    "pairwise_overlap",
    "pass_at_k",
    "policy_shaping_weight",
    "residual",
    "reward_span",
    "sequence_importance_weight",
    "total_reward",
    "truncated_importance_weight",
]
