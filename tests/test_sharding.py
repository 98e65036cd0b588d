"""Policies of which each of two real processes holds a part (FSDP2, and ZeRO where DeepSpeed is installed) train as a whole one does."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from trl import GRPOTrainer

from tests.models import tiny_model
from tests.processes import launch, needs_deepspeed
from tests.training import (
    INJECTED,
    expert_dataset,
    length_reward,
    make_plain_trainer,
    make_trainer,
    path_dataset,
)
from trl_selective import PassAtKCallback, SelectiveGuidanceGRPOTrainer
from trl_selective.sharding import loading_whole

# Guided, injected and on-policy rows; policy and expert score completions, of which one process has more than a batch, and the other none.
# With Adam's own epsilon of 1e-8, the sign of a gradient that is nearly 0, which the order of a sum decides, makes a whole step.
RUN = {
    "adam_epsilon": 1e-5,
    "injection_selector": "learnable",
    "injection_correction": "truncated",
    "max_injected_per_batch": 1,
    "num_short_completions": 5,
}
LORA = {**RUN, "lora": True, "learning_rate": 1e-3}


def case(config: str, run: dict, name: str, *marks):
    return pytest.param(config, run, id=f"{config}-{name}", marks=[*marks, *[needs_deepspeed] * ("zero" in config)])


def assert_same(records, parameters, one, expected) -> None:
    for step in range(3):
        assert records[0]["lengths"][step] + records[1]["lengths"][step] == one["lengths"][step]
        assert records[0]["injected"][step] == records[1]["injected"][step] == one["injected"][step]
    assert any(one["injected"])
    for record, trained in zip(records, parameters, strict=True):
        for name, values in one["logs"].items():
            assert record["logs"][name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
        assert trained.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "run"),
    [
        case("fsdp2", RUN, "model"),
        case("fsdp2", LORA, "adapter", pytest.mark.slow),
        case("zero3", RUN, "model", pytest.mark.slow),
        case("zero3", LORA, "adapter", pytest.mark.slow),
        case("zero2", RUN, "model", pytest.mark.slow),
        case("zero1", RUN, "model", pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(tmp_path, config, run):
    """To 1e-6 after 3 steps of two micro-batches; each holds half of the parameters after rollouts and updates, where they are divided."""
    (one,), (expected,) = launch(tmp_path / "one", 1, {**run, "per_device_train_batch_size": 8})
    both, parameters = launch(tmp_path / "two", 2, {**run, "per_device_train_batch_size": 4}, config)
    assert_same(both, parameters, one, expected)
    share = 0.5 if config in ("fsdp2", "zero3") else 1
    for record in both:
        assert record["held"] == pytest.approx([share * one["held"][0]] * 4, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "run"), [case("fsdp2", RUN, "model"), case("zero3", RUN, "model")])
def test_a_process_whose_rollouts_end_at_once_waits_for_none(tmp_path, config, run):
    """Its policy is asked once where that of the other is asked 26 times: the result is that of DDP."""
    run = {**run, "per_device_train_batch_size": 4, "ends_at_once": [1]}
    expected, (wanted, _) = launch(tmp_path / "ddp", 2, run)
    both, parameters = launch(tmp_path / "sharded", 2, run, config)
    assert {length for step in both[1]["lengths"] for length in step} == {1}
    assert max(length for step in both[0]["lengths"] for length in step) > 8
    one = {**expected[0], "lengths": [a + b for a, b in zip(*(r["lengths"] for r in expected), strict=True)]}
    assert_same(both, parameters, one, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "run"),
    [case("fsdp2", RUN, "model"), case("fsdp2", LORA, "adapter"), case("zero3", RUN, "model")],
)
def test_a_resumed_run_ends_as_one_that_went_on(tmp_path, config, run):
    run = {**run, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
    whole, (expected, _) = launch(tmp_path / "whole", 2, run, config)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed, (parameters, _) = launch(
        tmp_path / "resumed", 2, {**run, "resume_from_checkpoint": checkpoint, "steps_done": 2}, config
    )
    assert [record["lengths"] for record in resumed] == [record["lengths"][2:] for record in whole]
    for name, values in whole[0]["logs"].items():
        assert resumed[0]["logs"][name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "run"), [case("fsdp2", RUN, "model"), case("zero3", RUN, "model")])
def test_the_main_process_evaluates_alone(tmp_path, config, run):
    """Also between two updates with nothing else than their loss: training goes on as if nothing had happened."""
    run = {**run, "per_device_train_batch_size": 4, "num_iterations": 2}
    plain, (expected, _) = launch(tmp_path / "plain", 2, run, config)
    watched, (parameters, _) = launch(tmp_path / "watched", 2, {**run, "watched": True}, config)
    assert [len(record["pass_at_4"]) for record in (*plain, *watched)] == [0, 0, 4, 0]
    assert watched[0]["logs"] == plain[0]["logs"]
    assert all(torch.equal(parameters[name], value) for name, value in expected.items())


# ---- What is refused -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shard(monkeypatch):
    """Accelerate says of a trainer that its policy is sharded, which it never does on a CPU."""

    def says(trainer, plugin) -> None:
        if isinstance(plugin, FullyShardedDataParallelPlugin):
            monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
        else:
            monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", property(lambda state: plugin))

    return says


FSDP1, FSDP2 = (FullyShardedDataParallelPlugin(fsdp_version=version) for version in (1, 2))
ZERO3 = SimpleNamespace(zero_stage=3)


def test_transformers_is_told_of_zero3_again(monkeypatch):
    """With `zero3_init_flag: false`, too, where accelerate has nothing to undo."""
    calls = []
    plugin = SimpleNamespace(
        zero_stage=3,
        zero3_init_context_manager=lambda enable: nullcontext(calls.append(enable)),
        set_deepspeed_weakref=lambda: calls.append("again"),
    )
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", property(lambda state: plugin))
    with pytest.raises(OSError, match="gone"), loading_whole(accelerator):
        raise OSError("gone")
    assert calls == [False, "again"]


@pytest.mark.parametrize(
    ("plugin", "changes", "message"),
    [
        (FSDP1, {}, "num_injected_completions > 0 needs the whole policy .* FSDP1 cannot give. Use FSDP2: `fsdp_vers"),
        (ZERO3, {"ds3_gather_for_generation": False}, "got ds3_gather_for_generation=False with ZeRO-3. Set it to True"),
        (ZERO3, {"mixture_policy": "initial"}, "mixture_policy='initial' keeps a second model .* or use DDP or ZeRO-2"),
        (FSDP2, {"expert_model_shares_base": True}, "expert_model_shares_base=True keeps a second model .* or use DDP"),
    ],
)  # fmt: skip
def test_what_does_not_work_on_a_part_is_refused(tmp_path, shard, plugin, changes, message):
    trainer = make_trainer(tmp_path, settings=INJECTED, train_dataset=expert_dataset(8))
    shard(trainer, plugin)
    for name, value in changes.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        trainer._check_run()


@pytest.mark.parametrize("plugin", [ZERO3, FSDP2])
def test_an_expert_that_was_not_loaded_whole_is_refused(tmp_path, monkeypatch, shard, plugin):
    monkeypatch.setattr(FSDP2, "cpu_ram_efficient_loading", True)
    trainer = make_trainer(tmp_path)
    shard(trainer, plugin)
    with pytest.raises(ValueError, match=r"expert_model is a LlamaForCausalLM, which .* Pass its name or path"):
        trainer._set_up_expert(tiny_model(0), None)


@pytest.mark.parametrize(
    ("plugin", "trainer_class", "message"),
    [
        (FSDP1, SelectiveGuidanceGRPOTrainer, "PassAtKCallback needs the whole policy .* which FSDP1 cannot give"),
        (FSDP2, GRPOTrainer, "a GRPOTrainer cannot put them together. Use SelectiveGuidanceGRPOTrainer, which is"),
    ],
)
def test_an_evaluation_of_a_part_is_refused(tmp_path, shard, plugin, trainer_class, message):
    trainer = make_plain_trainer(tmp_path, trainer_class)
    shard(trainer, plugin)
    with pytest.raises(ValueError, match=message):
        PassAtKCallback(trainer, path_dataset(1), length_reward, every_n_steps=1)
