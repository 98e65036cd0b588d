"""The benchmarks run, and their columns are what they say."""

import subprocess
import sys
from pathlib import Path

import pytest
from trl import GRPOTrainer

from tests.benchmarks.models import SHAPES, Disagreement, make_expert, make_policy, make_prompts
from tests.benchmarks.sampling import PLAIN, measure
from tests.benchmarks.timing import interleaved, median_ratio
from tests.benchmarks.training import take_turns
from tests.training import make_plain_trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def policy():
    return make_policy(SHAPES["tiny"])


def test_every_sampler_in_a_cell(policy):
    expert = make_expert(policy, times=1)
    agreement = Disagreement(policy, expert).set(0.1)
    assert agreement.rejected == pytest.approx(0.1, abs=0.01)
    lines = {line.name: line for line in measure(policy, expert, agreement.entropy_threshold, 6, 20, repeats=2)}
    assert lines[PLAIN].ratio == 1
    assert lines["stepwise"].expert_forwards == lines["coin"].policy_forwards == 1
    assert 0 < lines["speculative, 8"].expert_forwards < lines["speculative, 2"].expert_forwards <= 1
    assert 0.7 < lines["auto"].acceptance < 1
    fewer = measure(policy, expert, agreement.entropy_threshold, 6, 20, 1, [2, 4], ["stepwise", "speculative"])
    names = [line.name for line in fewer]
    assert names == [PLAIN, "own loop, w = 0", "stepwise", "speculative, 2", "speculative, 4"]


def test_a_larger_expert_says_the_same_at_a_higher_cost(policy):
    expert = make_expert(policy, times=3)
    assert len(expert.model.layers) == 3 * len(policy.model.layers)
    assert Disagreement(policy, expert).set(0.0).rejected < 1e-5
    inputs = {"input_ids": policy.dummy_inputs["input_ids"] % 50}
    assert expert(**inputs).logits.sub(policy(**inputs).logits).abs().max() < 1e-4


def test_rows_of_a_group_have_one_prompt(policy):
    prompts = make_prompts(policy, 10)
    assert [prompts.index(prompt) for prompt in prompts] == [0] * 4 + [4] * 4 + [8] * 2


def test_runs_take_turns(capsys):
    order = []
    seconds = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, repeats=2)
    assert "".join(order) == "abccba"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    assert [line[:2] for line in capsys.readouterr().err.splitlines()] == [f"{name}:" for name in order]
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 1.0, 2.0]) == 2


def test_a_trainer_that_fails_ends_all(tmp_path):
    """The second of three, in its second step; the others wait for turns."""
    trainers = {name: make_plain_trainer(tmp_path / name, GRPOTrainer) for name in "abc"}
    broken = trainers["b"]
    compute = broken._compute_loss
    broken._compute_loss = lambda *inputs: compute(*inputs) if not broken.state.global_step else 1 / 0
    with pytest.raises(ZeroDivisionError):
        take_turns(trainers)


@pytest.mark.parametrize(
    "arguments",
    [
        "sampling --shape tiny --device cpu --batch 2 --length 8 --expert 1 --rejected 0.1 --repeats 1",
        "training --shape tiny --steps 1 --prompts 1 --length 8",
    ],
)
def test_the_commands(arguments):
    command = [sys.executable, "-m", "tests.benchmarks", *arguments.split()]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "| 1.00" in result.stdout
