"""Guidance off is GRPOTrainer, bit for bit: losses and all logs, parameters, and the state of the random number generators after 3 steps."""

import random

import numpy as np
import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from tests.training import EXPERT, length_reward, make_plain_trainer
from trl_selective import SelectiveGuidanceGRPOConfig, SelectiveGuidanceGRPOTrainer

CLOCK = ("time", "_per_second", "runtime")


def run(folder, trainer_class, config_class, **changes):
    trainer = make_plain_trainer(folder, trainer_class, config_class, reward_funcs=length_reward, **changes)
    before = trainer.model.lm_head.weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.lm_head.weight, before)
    logs = [
        {k: v for k, v in entry.items() if not any(word in k for word in CLOCK)} for entry in trainer.state.log_history
    ]
    rng = torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64)), random.getstate()
    return logs, dict(trainer.model.state_dict()), rng


def assert_same_run(ours, theirs):
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(ours[1][name], tensor) for name, tensor in theirs[1].items())
    assert torch.equal(ours[2][0], theirs[2][0])
    assert torch.equal(ours[2][1], theirs[2][1])
    assert ours[2][2] == theirs[2][2]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta": 0.04, "num_iterations": 2, "gradient_accumulation_steps": 2, "loss_type": "grpo"},
        {"temperature": 0.7, "top_p": 0.9, "scale_rewards": "none", "loss_type": "dr_grpo", "eval_strategy": "no"},
    ],
    ids=["default", "kl_and_iterations", "dr_grpo"],
)
@pytest.mark.parametrize("config_class", [SelectiveGuidanceGRPOConfig, GRPOConfig])
def test_off_is_grpo(tmp_path, config_class, changes):
    theirs = run(tmp_path / "trl", GRPOTrainer, GRPOConfig, **changes)
    ours = run(tmp_path / "ours", SelectiveGuidanceGRPOTrainer, config_class, **changes)
    assert_same_run(ours, theirs)


def test_at_alpha_0_it_is_grpo_too_and_the_expert_is_not_called(tmp_path, monkeypatch):
    """The schedule has ended before the first step: all rows are on-policy, though an expert is loaded."""
    theirs = run(tmp_path / "trl", GRPOTrainer, GRPOConfig)
    trainers = []
    create = SelectiveGuidanceGRPOTrainer._set_up_guidance

    def set_up(self, *args):
        create(self, *args)
        self.expert_model.forward = None  # a call would fail
        trainers.append(self)

    monkeypatch.setattr(SelectiveGuidanceGRPOTrainer, "_set_up_guidance", set_up)
    ours = run(
        tmp_path / "ours",
        SelectiveGuidanceGRPOTrainer,
        SelectiveGuidanceGRPOConfig,
        num_guided_generations=2,
        guidance_steps=0,
        expert_model_name_or_path=EXPERT,
        expert_model=None,
    )
    assert trainers
    for entry in ours[0]:
        assert entry.pop("guidance/coef", 0.0) == entry.pop("guidance/rows", 0.0) == 0.0
    assert_same_run(ours, theirs)


def test_the_run_is_not_trivially_equal(tmp_path):
    """The comparison sees a difference where there is one."""
    first = run(tmp_path / "a", GRPOTrainer, GRPOConfig)
    second = run(tmp_path / "b", GRPOTrainer, GRPOConfig, seed=1)
    with pytest.raises(AssertionError):
        assert_same_run(first, second)
