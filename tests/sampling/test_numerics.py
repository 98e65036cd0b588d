"""Half precision, huge logits, forbidden tokens, and numbers that are none: a valid record, or an error that names the row."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.models import tiny_model
from tests.sampling.reference import PROMPTS, Guidance

KINDS = ["stepwise", "coin", 1, 4, None]
RAMP = Guidance(threshold=1.2)
LENGTH = 12


class Bent(nn.Module):
    """A model whose logits are changed by `bend(logits, input_ids)`."""

    def __init__(self, model, bend):
        super().__init__()
        self.model, self.bend, self.config = model, bend, model.config

    def forward(self, input_ids, **kwargs):
        output = self.model(input_ids=input_ids, **kwargs)
        output.logits = self.bend(output.logits, input_ids)
        return output


def numbers(rollout, *fields) -> torch.Tensor:
    return torch.tensor([value for field in fields for row in getattr(rollout, field) for value in row])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_logits_of_every_size_in_every_precision(kind, dtype, scale):
    def scaled(logits, input_ids):
        return (logits / logits.abs().amax(-1, keepdim=True)) * scale

    policy, expert = (Bent(tiny_model(seed).to(dtype), scaled) for seed in (1, 2))
    rollout = RAMP.sample(kind, policy, expert, PROMPTS * 4, LENGTH, eos={1})
    logps = numbers(rollout, "sampling_per_token_logps", "policy_per_token_logps")
    assert logps.isfinite().all()
    assert logps.max() <= 1e-6
    entropies = numbers(rollout, "entropies")
    assert entropies.min() >= 0
    if scale == 1e4:  # all laws are certain, so that the policy goes its own way
        assert entropies.max() < 1e-3
        assert not any(map(any, rollout.expert_drawn))
    if scale == 1e-4:  # all laws are uniform
        assert entropies.min() > 1.9
        assert logps.sub(-torch.tensor(7.0).log()).abs().max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_laws_are_taken_in_float32(dtype):
    """bfloat16 keeps 8 bits: a softmax in it is off by half a percent."""
    sampler = RAMP.sampler("stepwise", tiny_model(1), tiny_model(2))
    logits = (3 * torch.randn(5, 1, 7)).to(dtype)
    exact = (logits.double() / 0.7).softmax(-1)
    torch.testing.assert_close(sampler._probs(logits, 0.7).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_weight", [0.5, 1.0])
def test_a_token_that_a_model_forbids_comes_from_the_other_alone(kind, max_weight):
    def forbid(*ids):
        return lambda logits, input_ids: logits.index_fill(-1, torch.tensor(ids), -torch.inf)

    policy, expert = Bent(tiny_model(1), forbid(3, 6)), Bent(tiny_model(2), forbid(4, 6))
    guidance = Guidance("constant", max_weight=max_weight)
    is_guided = [True, False] * 6
    rollout = guidance.sample(kind, policy, expert, PROMPTS * 4, LENGTH, is_guided=is_guided)
    assert numbers(rollout, "sampling_per_token_logps", "policy_per_token_logps").isfinite().all()
    guided = {token for ids in rollout.completion_ids[::2] for token in ids}
    others = {token for ids in rollout.completion_ids[1::2] for token in ids}
    assert 3 in guided
    assert guided <= ({0, 1, 2, 3, 5} if max_weight == 1 else {0, 1, 2, 3, 4, 5})
    assert others <= {0, 1, 2, 4, 5}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", [0, 1], ids=["policy", "expert"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_row_with_a_law_that_is_none_is_named(kind, role, value):
    """Only what comes after the token 6 is spoilt, and only one prompt ends with it."""

    def spoil(logits, input_ids):
        return torch.where((input_ids[:, -logits.size(1) :] == 6).unsqueeze(-1), value, logits)

    def forbid(logits, input_ids):
        return logits.index_fill(-1, torch.tensor([6]), -torch.inf)

    models = [Bent(tiny_model(1), forbid), Bent(tiny_model(2), forbid)]
    models[role] = Bent(models[role], spoil)
    guidance = Guidance("constant", max_weight=0.5)
    prompts = [[2, 3], [3], [5, 2, 6], [4, 4]]
    with pytest.raises(ValueError, match="Row 2, token 0 has log pi_mix = nan"):
        guidance.sample(kind, *models, prompts, LENGTH, is_guided=[False, True, True, False])


MEMORY = """
import resource, sys
import torch
from tests.models import tiny_model
from tests.sampling.reference import Guidance
kind, lengths = eval(sys.argv[1]), eval(sys.argv[2])
models = [tiny_model(seed, vocab_size=150_000, hidden_size=8, head_dim=4, max_position_embeddings=8200) for seed in (1, 2)]
guidance = Guidance("constant", max_weight=1e-9, vocab_size=150_000) if kind == "coin" else Guidance(threshold=40.0, vocab_size=150_000)
for length in lengths:
    rollout = guidance.sample(kind, *models, [[2, 3]] * 2, length)
    assert rollout.num_tokens == 2 * length
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kind", "length"), [("stepwise", 112), ("coin", 112), (4, 112), (None, 112), (4, 8192)])
def test_memory_does_not_grow_with_tokens_times_vocabulary(kind, length):
    """150,000 ids: the laws of 96 tokens of two rows would take 115 MB in float32, and twice as much in the float64 that tokens are drawn in;
    those of 8,192 tokens 9.8 GB."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", MEMORY, repr(kind), f"[16, {length}]"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    short, long = map(int, result.stdout.split())
    assert long - short < 40e6
