"""Which sampler for which models and device."""

from torch import nn

from trl_selective.sampling.kv import can_forget_tokens
from trl_selective.sampling.sampler import GuidedSampler
from trl_selective.sampling.speculative import SpeculativeSampler
from trl_selective.sampling.stepwise import StepwiseSampler


def make_sampler(
    name: str, policy: nn.Module, expert: nn.Module, *, draft_length: int | None, max_draft_length: int, **kwargs
) -> GuidedSampler:
    """The sampler called `name`: "stepwise", "speculative", or "auto".

    "auto" drafts where an expert forward of several tokens costs about as much as one of a single token: on accelerators. On a CPU it costs
    its arithmetic, and stepwise is faster. The expert's device tells, since the policy may not be in its place yet. A given `draft_length`
    asks for drafts anywhere.
    """
    if name == "auto":
        wants_drafts = draft_length is not None or next(expert.parameters()).device.type != "cpu"
        can_draft = all(can_forget_tokens(model.config) for model in (policy, expert))
        name = "speculative" if wants_drafts and can_draft else "stepwise"
    if name == "speculative":
        return SpeculativeSampler(
            policy, expert, draft_length=draft_length, max_draft_length=max_draft_length, **kwargs
        )
    return StepwiseSampler(policy, expert, **kwargs)
