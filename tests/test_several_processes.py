"""Two processes (DDP over gloo) are one: the same rollouts, threshold, rewards and parameters, and never a wait without end."""

import random

import pytest
import torch

from tests.processes import launch, needs_deepspeed


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="model"),
        pytest.param(
            {"lora": True, "expert_model_shares_base": True, "learning_rate": 1e-3},
            id="adapter",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_equal_one(tmp_path, settings):
    """Guided, injected and on-policy rows together, of very different lengths: to 1e-6 after 3 steps of two micro-batches."""
    (one,), (expected,) = launch(tmp_path / "one", 1, {**settings, "per_device_train_batch_size": 8})
    both, parameters = launch(tmp_path / "two", 2, {**settings, "per_device_train_batch_size": 4})
    for step in range(3):
        assert both[0]["lengths"][step] + both[1]["lengths"][step] == one["lengths"][step]
        assert both[0]["drawn"][step] + both[1]["drawn"][step] == one["drawn"][step]
        assert both[0]["injected"][step] == both[1]["injected"][step] == one["injected"][step]
    assert all(one["injected"])
    assert max(max(lengths) - min(lengths) for lengths in one["lengths"]) >= 8
    assert sum(one["drawn"]) > 0
    for record, trained in zip(both, parameters, strict=True):
        # One threshold and one table of rewards for each step, whatever the number of processes and micro-batches.
        assert record["counts"] == one["counts"] == {"thresholds": 3, "rewards": 3, "rollouts": 3}
        for name, values in one["logs"].items():
            assert len(values) == 3, name
            assert record["logs"][name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
        for name, value in expected.items():
            torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-6)
            assert torch.equal(trained[name], parameters[0][name])


def random_run(seed: int) -> dict:
    """Settings that let processes disagree: on what ends when, on who is guided, and on what there is to inject."""
    rng = random.Random(seed)
    guided, injected = rng.choice([(1, 0), (2, 0), (0, 1), (1, 1)])
    run = {
        "seed": seed,
        "num_guided_generations": guided,
        "num_injected_completions": injected,
        "guided_sampler": rng.choice(["stepwise", "coin", "speculative", "auto"]),
        "max_completion_length": rng.choice([2, 9, 26]),
        "entropy_threshold_init": rng.choice([None, 0.0, 1.0]),
        "guidance_weighting": rng.choice(["entropy", "hard_gate", "constant"]),
        "injection_trigger": rng.choice(["always", "group_failed", "with_probability"]),
        "injection_selector": rng.choice(["first", "random", "novel", "reward_gain", "learned"]),
        "max_injected_per_batch": rng.choice([1, 3, None]),
        "injection_correction": rng.choice(["policy_shaping", "truncated"]) if guided else "policy_shaping",
        "overlong_expert_completions": rng.choice(["drop", "truncate"]),
        "guidance_steps": rng.choice([0.5, 100]),
        "num_iterations": rng.choice([1, 2]),
        "per_device_train_batch_size": rng.choice([4, 8]),
        "gradient_accumulation_steps": rng.choice([1, 2]),
        "loss_type": rng.choice(["dapo", "grpo", "dr_grpo"]),
        "mask_truncated_completions": rng.random() < 0.3,
        "ends_at_once": rng.choice([[], [0], [1]]),
        "max_steps": 2,
    }
    run["mask_truncated_completions"] &= run["overlong_expert_completions"] == "drop"  # else it is refused
    return run


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    ("config", "num_runs"), [(None, 50), ("fsdp2", 20), pytest.param("zero3", 20, marks=needs_deepspeed)]
)
def test_no_process_waits_for_ever(tmp_path, config, num_runs):
    """Short runs, each of which must end by itself within four minutes."""
    for seed in range(num_runs):
        _, parameters = launch(tmp_path / str(seed), 2, random_run(seed), config, timeout=240)
        assert all(torch.equal(parameters[0][name], value) for name, value in parameters[1].items()), seed
