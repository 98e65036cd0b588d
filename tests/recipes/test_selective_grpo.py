"""The training script, started as a user starts it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, TrlParser

from tests.training import EXPERT, POLICY, QUICKSTART, path_dataset
from trl_selective import SelectiveGuidanceGRPOConfig

RECIPES = QUICKSTART.parent
SCRIPT = RECIPES / "selective_grpo.py"
sys.path.insert(0, str(RECIPES))
from loading import ScriptArguments, load_splits  # noqa: E402
from selective_grpo import main, resume_point  # noqa: E402

SETTINGS = """
model_name_or_path: {policy}
expert_model_name_or_path: {expert}
output_dir: {folder}/out
dataset_name: {data}
reward_funcs: [my_reward.letters, my_reward.half]
reward_weights: [1.0, 0.5]
num_generations: 4
num_guided_generations: 2
entropy_threshold_init: 1.0
per_device_train_batch_size: 8
max_steps: 2
max_completion_length: 26
learning_rate: 1.0e-3
bf16: false
gradient_checkpointing: false
use_cpu: true
report_to: none
logging_steps: 1
save_strategy: "no"
"""
REWARD = """
def letters(completions, **kwargs):
    return [len(set(completion)) / 10 for completion in completions]
def half(completions, walls, **kwargs):
    return [0.5 for _ in completions]
"""


def prepare(folder, data=None):
    """A working directory with problems, rewards and a config."""
    if data is None:
        data = folder / "problems.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in path_dataset(16)))
    (folder / "my_reward.py").write_text(REWARD)
    (folder / "config.yaml").write_text(SETTINGS.format(policy=POLICY, expert=EXPERT, folder=folder, data=data))


def launch(folder, *arguments, data=None, **environment):
    """`accelerate launch` in `folder`."""
    prepare(folder, data)
    how = ["--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *how,
        str(SCRIPT),
        "--config",
        "config.yaml",
        *arguments,
    ]
    environment = {**os.environ, "PYTHONPATH": str(QUICKSTART.parents[1]), **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_run_leaves_model_tokenizer_card_logs_and_picture(tmp_path):
    result = launch(tmp_path, "--max_steps", "3", "--preset", "mentor_corrected")  # the command line wins
    assert result.returncode == 0, result.stderr[-3000:]
    assert "preset 'mentor_corrected'" in result.stdout
    out = tmp_path / "out"
    trained, start = AutoModelForCausalLM.from_pretrained(out), AutoModelForCausalLM.from_pretrained(POLICY)
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(POLICY).get_vocab()
    card = (out / "README.md").read_text()
    assert "2510.04140" in card
    assert "Model Card for out" in card
    assert str(tmp_path) not in card
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "guidance/weight" in entry] == [1, 2]  # 0.6 of 3 steps
    assert (out / "training_dynamics.png").stat().st_size > 10_000


def test_an_adapter_with_a_conversation_and_an_evaluation(tmp_path):
    """A `save_to_disk` folder, another prompt column, a system prompt, LoRA: each changes something that is looked at."""
    rows = path_dataset(16).rename_column("prompt", "problem")
    folder = tmp_path / "data"
    DatasetDict({"train": rows, "test": rows.select(range(4))}).save_to_disk(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.chat_template = "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}{% endfor %}"
    model = AutoModelForCausalLM.from_pretrained(POLICY)
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    (tmp_path / "my_reward.py").write_text("")
    result = launch(
        tmp_path, "--prompt_column", "problem", "--system_prompt", "Find a path.", "--use_peft", "--lora_r", "2",
        "--lora_target_modules", "q_proj", "v_proj", "--eval_strategy", "steps", "--eval_steps", "1", "--reward_funcs",
        "think_boxed_format", "--reward_weights", "1.0", "--model_name_or_path", str(tmp_path / "chat"), "--eos_token", "<eos>",
        data=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    out = tmp_path / "out"
    assert (out / "adapter_model.safetensors").exists()
    assert not (out / "model.safetensors").exists()
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_reward" in entry] == [1, 2]


def test_splits_of_a_folder(tmp_path):
    """Files called train and test are the splits."""
    for name, count in (("train", 3), ("test", 2)):
        Dataset.from_dict({"q": [f"{name} {i}" for i in range(count)]}).to_json(tmp_path / f"{name}.jsonl")
    splits = load_splits(ScriptArguments(dataset_name=str(tmp_path), prompt_column="q", system_prompt="Be brief."))
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "test": 2}
    assert splits["test"][1]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "test 1"},
    ]


def test_without_a_dataset():
    with pytest.raises(ValueError, match="dataset_name is not set"):
        load_splits(ScriptArguments())


def test_without_a_model():
    _, args, model = parse("--output_dir", "out", "--bf16", "false")
    with pytest.raises(ValueError, match="model_name_or_path is not set: give the Hub id or the folder of the policy"):
        main(ScriptArguments(dataset_name="absent"), args, model)


def test_a_run_resumes_and_needs_no_logs(tmp_path):
    """From step 2 of 3, found by the word `true`, to the parameters of the unbroken run."""
    steps = ("--max_steps", "3", "--logging_strategy", "no")
    result = launch(tmp_path, *steps, "--save_strategy", "steps", "--save_steps", "2")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "No picture of the training dynamics: None of the runs" in result.stderr
    out = tmp_path / "out"
    expected = load_file(out / "model.safetensors")
    shutil.rmtree(out / "checkpoint-3")
    (out / "model.safetensors").unlink()
    result = launch(tmp_path, *steps, "--resume_from_checkpoint", "true")
    assert result.returncode == 0, result.stderr[-3000:]
    resumed = load_file(out / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())
    assert " 3/3 " in result.stderr
    assert " 1/3 " not in result.stderr  # it did not start again


@pytest.mark.parametrize(
    ("value", "expected"), [("true", True), (True, True), ("False", False), (None, None), ("out/c-2", "out/c-2")]
)
def test_resume_point(value, expected):
    assert resume_point(value) == expected


def parse(*arguments):
    return TrlParser((ScriptArguments, SelectiveGuidanceGRPOConfig, ModelConfig)).parse_args_and_config(arguments)


def test_json_settings_on_the_command_line():
    _, args, _ = parse(
        "--output_dir", "out", "--bf16", "false", "--num_guided_generations", "4", "--expert_model_init_kwargs", '{"dtype": "float16"}'
    )  # fmt: skip
    assert args.expert_model_init_kwargs == {"dtype": "float16"}


def test_a_switch_needs_no_value():
    for arguments, expected in [
        ((), False),
        (("--first_token_from_expert",), True),
        (("--first_token_from_expert", "no"), False),
    ]:
        _, args, _ = parse("--output_dir", "out", "--bf16", "false", *arguments)
        assert args.first_token_from_expert is expected
