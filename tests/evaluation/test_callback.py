"""pass@k while training: what it logs, and that training does not notice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from tests.training import EXPERT, GUIDED, PLAIN, POLICY, make_trainer, path_dataset, path_reward
from trl_selective import PassAtKCallback, SelectiveGuidanceGRPOTrainer
from trl_selective.evaluation import evaluate
from trl_selective.functional import distinct_n, pairwise_overlap
from trl_selective.sampling.unguided import encode_prompt

EVERYWHERE = ("eval/pass@1", "eval/pass@4", "diversity/distinct_correct", "diversity/distinct_2", "diversity/pairwise_overlap")  # fmt: skip


class Tracker(TrainerCallback):
    """Hears what trackers such as Weights & Biases hear."""

    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.heard.append((state.global_step, dict(logs)))


def train(folder, *, settings=GUIDED, init=None, callback=None, **changes):
    trainer = make_trainer(folder, settings=settings, init={"callbacks": [Tracker()], **(init or {})}, **changes)
    if callback is not None:
        callback = {"num_samples": 4, "batch_size": 16, **callback}
        trainer.add_callback(PassAtKCallback(trainer, path_dataset(6), path_reward, **callback))
    trainer.train()
    return trainer


def ours(history):
    return {entry["step"]: entry for entry in history if "eval/pass@1" in entry}


def without_times(history):
    return [
        {name: value for name, value in entry.items() if "time" not in name and "second" not in name}
        for entry in history
        if "eval/pass@1" not in entry
    ]


def test_training_with_it_is_training_without_it(tmp_path):
    """To the last bit of all parameters and of all that is logged, averages over two steps included."""
    plain = train(tmp_path / "plain", logging_steps=2, max_steps=4)
    watched = train(tmp_path / "watched", logging_steps=2, max_steps=4, callback={"every_n_steps": 1})
    for name, value in plain.model.state_dict().items():
        assert torch.equal(watched.model.state_dict()[name], value), name
    assert without_times(watched.state.log_history) == without_times(plain.state.log_history)
    assert list(ours(watched.state.log_history)) == [0, 1, 2, 3, 4]


def test_it_logs_what_evaluate_finds_to_the_history_and_to_trackers(tmp_path):
    trainer = train(
        tmp_path, model=EXPERT, expert_model=None, settings=PLAIN, max_steps=2, callback={"every_n_steps": 2}
    )
    logged = ours(trainer.state.log_history)
    assert list(logged) == [0, 2]
    result = evaluate(
        trainer.model, AutoTokenizer.from_pretrained(EXPERT), path_dataset(6), path_reward,
        num_samples=4, ks=(1, 4), max_completion_length=26, batch_size=16,
    )  # fmt: skip
    expected = (
        result.pass_at_k[1],
        result.pass_at_k[4],
        result.distinct_correct,
        sum(distinct_n(samples, 2) for samples in result.completion_ids) / 6,
        sum(pairwise_overlap(samples, 2) for samples in result.completion_ids) / 6,
    )
    assert tuple(logged[2][name] for name in EVERYWHERE) == pytest.approx(expected)
    assert 0.5 < logged[2]["eval/pass@1"] <= logged[2]["eval/pass@4"] <= 1
    (tracker,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, Tracker))
    heard = {step: logs for step, logs in tracker.heard if "eval/pass@1" in logs}
    assert heard == {step: {k: v for k, v in entry.items() if k != "step"} for step, entry in logged.items()}


def test_with_an_adapter_at_each_evaluation_of_the_trainer(tmp_path):
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = train(
        tmp_path, init={"peft_config": adapter, "eval_dataset": path_dataset(4)}, settings=PLAIN, learning_rate=0.1,
        eval_strategy="steps", eval_steps=2, max_steps=2, callback={"temperature": 0.5, "ks": [2]},
    )  # fmt: skip
    (entry,) = (entry for entry in trainer.state.log_history if "eval/pass@2" in entry)
    assert entry["step"] == 2
    result = evaluate(
        trainer.model, trainer.processing_class, path_dataset(6), path_reward,
        num_samples=4, ks=[2], max_completion_length=26, batch_size=16, temperature=0.5,
    )  # fmt: skip
    assert entry["diversity/distinct_2"] == pytest.approx(sum(distinct_n(s, 2) for s in result.completion_ids) / 6)


def test_other_processes_do_not_sample(tmp_path):
    """They go on to their next step, where they wait: nothing in it is collective."""
    trainer = make_trainer(tmp_path, settings=PLAIN)
    callback = PassAtKCallback(trainer, path_dataset(2), path_reward, num_samples=1, every_n_steps=1)
    for is_main in (False, True):
        trainer.state.is_world_process_zero = is_main
        callback.on_step_end(trainer.args, trainer.state, trainer.control)
        assert len(trainer.state.log_history) == is_main


TWO_PROCESSES = """
import sys
from tests.training import make_trainer, path_dataset, path_reward
from trl_selective import PassAtKCallback

trainer = make_trainer(sys.argv[1], per_device_train_batch_size=8, ddp_find_unused_parameters=False)
if sys.argv[2] == "watched":
    trainer.add_callback(PassAtKCallback(trainer, path_dataset(6), path_reward, num_samples=4, every_n_steps=1))
trainer.train()
if trainer.is_world_process_zero():
    trainer.save_model()
    trainer.save_state()
"""


@pytest.mark.slow
def test_two_processes_train_as_without_it(tmp_path):
    """The second one waits for the first, which alone evaluates, and both go on as if nothing had happened."""
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    for name in ("plain", "watched"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*launch, str(tmp_path / "train.py"), str(tmp_path / name), name]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    plain, watched = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "watched"))
    assert all(torch.equal(watched[name], value) for name, value in plain.items())
    history = json.loads((tmp_path / "watched" / "trainer_state.json").read_text())["log_history"]
    assert list(ours(history)) == [0, 1, 2, 3]


def test_prompts_are_those_of_training(tmp_path):
    """With the chat template of the run, and its arguments."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ end or ' :' }}"
    sampled = set()

    class Watching(SelectiveGuidanceGRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            sampled.update(map(tuple, prompt_ids))
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "7 > 11"}]}] * 8)
    trainer = make_trainer(
        tmp_path,
        settings=PLAIN,
        trainer_class=Watching,
        train_dataset=rows,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        init={"processing_class": tokenizer},
        chat_template_kwargs={"end": " >"},
        max_steps=1,
    )
    callback = PassAtKCallback(trainer, rows, path_reward, every_n_steps=1)
    trainer.train()
    (prompt_ids,) = sampled
    assert list(prompt_ids) == encode_prompt(tokenizer, rows[0]["prompt"], callback.settings["chat_template_kwargs"])
    assert prompt_ids[-1] == tokenizer(">").input_ids[-1]


def test_a_single_sample_has_no_pairs(tmp_path):
    trainer = make_trainer(tmp_path, settings=PLAIN)
    callback = PassAtKCallback(trainer, path_dataset(2), path_reward, num_samples=1, every_n_steps=1)
    callback.on_step_end(trainer.args, trainer.state, trainer.control)
    assert set(trainer.state.log_history[0]) == {"step", "eval/pass@1", "diversity/distinct_correct", "diversity/distinct_2"}  # fmt: skip


def test_what_cannot_work_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, settings=PLAIN)
    with pytest.raises(ValueError, match='would never run: every_n_steps is None and eval_strategy is "no"'):
        PassAtKCallback(trainer, path_dataset(1), path_reward)
    with pytest.raises(ValueError, match=r"every_n_steps must be at least 1, .* got 0"):
        PassAtKCallback(trainer, path_dataset(1), path_reward, every_n_steps=0)
