"""Which sampler for which models."""

from torch import nn

from trl_selective.sampling.coin import CoinSampler
from trl_selective.sampling.kv import can_forget_tokens
from trl_selective.sampling.remote import RemoteCoinSampler, RemoteExpert
from trl_selective.sampling.sampler import GuidedSampler
from trl_selective.sampling.speculative import SpeculativeSampler
from trl_selective.sampling.stepwise import StepwiseSampler


def make_sampler(
    name: str,
    policy: nn.Module,
    expert: nn.Module | RemoteExpert,
    *,
    draft_length: int | None,
    max_draft_length: int,
    **kwargs,
) -> GuidedSampler:
    """The sampler called `name`: "stepwise", "coin", "speculative", or "auto".

    "auto" drafts where both caches can take rejected tokens back, as far as pays: down to one token, which costs what stepwise does. Elsewhere
    it flips coins, which takes nothing back. So it does with an expert behind a server, the only way with one.
    """
    if isinstance(expert, RemoteExpert):
        assert name in ("auto", "coin"), f"a remote expert only draws: {name}"
        return RemoteCoinSampler(policy, expert, **kwargs)
    if name == "auto":
        can_draft = all(can_forget_tokens(model.config) for model in (policy, expert))
        name = "speculative" if can_draft else "coin"
    if name == "speculative":
        return SpeculativeSampler(
            policy, expert, draft_length=draft_length, max_draft_length=max_draft_length, **kwargs
        )
    without_drafts = {"stepwise": StepwiseSampler, "coin": CoinSampler}
    return without_drafts[name](policy, expert, **kwargs)
