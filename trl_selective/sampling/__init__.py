"""Samplers that draw completions from pi_mix, token by token, with two causal language models.

All of them draw from the same law. `StepwiseSampler` runs both models for every token: short, obviously right, the reference.
`SpeculativeSampler` lets the policy draft and the expert verify in parallel (MENTOR's Algorithm 1): fewer expert forwards.
`CoinSampler` lets a coin decide who draws: fewer expert forwards for caches that cannot take a token back.
`RemoteCoinSampler` does so with an expert behind a server, which is asked for single tokens.
"""

from trl_selective.sampling.auto import make_sampler
from trl_selective.sampling.coin import CoinSampler
from trl_selective.sampling.kv import can_forget_tokens
from trl_selective.sampling.remote import RemoteCoinSampler, RemoteExpert
from trl_selective.sampling.sampler import WEIGHTINGS, GuidedSampler
from trl_selective.sampling.speculative import SpeculativeSampler
from trl_selective.sampling.stepwise import StepwiseSampler

__all__ = [
    "WEIGHTINGS",
    "CoinSampler",
    "GuidedSampler",
    "RemoteCoinSampler",
    "RemoteExpert",
    "SpeculativeSampler",
    "StepwiseSampler",
    "can_forget_tokens",
    "make_sampler",
]
