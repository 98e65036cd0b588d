"""All recipes: parsed as a start parses them, with the paper's arithmetic, and through the dry run."""

import json
import re
import runpy
import sys
from dataclasses import replace

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer
from trl import ModelConfig, SFTConfig, TrlParser
from trl import ScriptArguments as TrlScriptArguments

from tests.recipes.test_selective_grpo import REWARD, launch
from tests.training import EXPERT, POLICY, QUICKSTART, expert_dataset, path_dataset
from trl_selective.memory import GIB, estimate_memory, model_size

RECIPES = QUICKSTART.parent
sys.path.insert(0, str(RECIPES))
from dry_run import ARCHITECTURES, dry_run, find_config, fit, plan  # noqa: E402
from selective_grpo import parse  # noqa: E402

METHODS = ("grpo", "luffy", "mentor", "mentor_corrected", "selective")
MODELS = {"Qwen2.5-3B": "Qwen/Qwen2.5-3B", "Qwen2.5-7B": "Qwen/Qwen2.5-7B", "Llama-3.1-8B": "meta-llama/Llama-3.1-8B"}
ALL = sorted(RECIPES.glob("*/*/config.yaml"))
PAPERS = [RECIPES / model / method / "config.yaml" for model in MODELS for method in METHODS]
LORA = RECIPES / "Qwen2.5-1.5B" / "mentor_lora" / "config.yaml"


def name_of(path):
    return "-".join(path.parts[-3:-1])


def parsed(path, *arguments):
    return parse(["--config", str(path), "--dry_run", *arguments])[1:]


def test_there_are_all_of_them():
    assert sorted([*PAPERS, LORA]) == ALL


@pytest.mark.parametrize("path", PAPERS, ids=name_of)
def test_the_papers_arithmetic(path):
    """128 prompts per batch, two updates of 64, whole groups on each of 8 processes, alpha to 0 over 120 of 200 batches."""
    script, args, model = parsed(path)
    assert model.model_name_or_path == MODELS[path.parts[-3]]
    assert script.reward_funcs == ["boxed_accuracy", "think_boxed_format"]
    assert args.reward_weights == ([0.8, 0.2] if "Llama" in str(path) else [0.9, 0.1])
    assert (args.learning_rate, args.temperature, args.epsilon, args.epsilon_high, args.beta) == (
        1e-6,
        1,
        0.2,
        0.28,
        0,
    )
    assert args.max_completion_length == 8192
    assert (args.weight_decay, args.lr_scheduler_type) == (0.01, "constant")

    rows = args.per_device_train_batch_size * args.steps_per_generation
    assert rows % args.num_generations == 0
    assert script.num_processes * rows == 128 * args.num_generations
    assert args.steps_per_generation == 2 * args.gradient_accumulation_steps
    assert args.max_steps == 2 * 200

    method = path.parts[-2]
    assert args.preset == (None if method == "grpo" else method)
    assert args.num_guided_generations == (4 if method.startswith("mentor") else 0)
    assert args.num_generations - args.num_guided_generations == 8
    assert args.num_injected_completions == (1 if method in ("luffy", "selective") else 0)
    if method in ("mentor", "mentor_corrected", "selective"):
        alpha = args.guidance_coef_schedule(args.max_steps)
        assert [alpha(0), alpha(2 * 120)] == pytest.approx([1, 0])
        assert alpha(2 * 120 - 1) > 0


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_dry_run(path, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    report = dry_run(*parsed(path))
    num_prompts = 8 if path == LORA else 128
    assert f"batches: {num_prompts} prompts x " in report
    assert "2 updates per batch" in report
    assert "is not on this machine" in report
    assert "(from architectures.yaml)" in report
    assert ("expert: " in report) == ("mentor" in str(path))
    assert re.search(r"^(no sharding|ZeRO-2 x 8): fits into", report, re.MULTILINE)
    assert ("\nZeRO-3 x 8: " in report) == (path != LORA)  # on a single GPU nothing is divided
    assert f"output_dir: outputs/{name_of(path)}" in path.read_text()


def test_every_value_says_where_it_is_from():
    """Up to the line that says so of all that follow."""
    for path in PAPERS:
        before = path.read_text().split("# ours, as all that follows")[0]
        lines = [line for line in before.splitlines()[2:] if re.match(r"\w+: .", line)]
        silent = {line.split(":")[0] for line in lines if not re.search(r"# (.*4\.1|ours|Eq\. 9|LUFFY|3, 4)", line)}
        assert silent <= {"prompt_column", "vllm_mode", "bf16"}, path
        assert len(path.read_text().splitlines()) < 50


def test_the_table_has_the_estimates():
    """Of every recipe: the peak without sharding and with ZeRO-2."""
    readme = (RECIPES / "README.md").read_text()
    for path in ALL:
        run = plan(*parsed(path)[1:], gib=80)
        cells = next(
            line for line in readme.splitlines() if f"({path.parent.relative_to(RECIPES)}/config.yaml)" in line
        )
        sharded = estimate_memory(replace(run, num_shards=8))
        expected = [estimate_memory(run).update_peak, estimate_memory(run).rollout_peak]
        expected += [] if path == LORA else [sharded.update_peak, sharded.rollout_peak]
        assert "| " + " | ".join(f"{size / GIB:.0f}" for size in expected) + " |" in cells, path


# The numbers of parameters on the models' pages of the Hub.
PUBLISHED = {
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-Math-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "open-r1/OpenR1-Qwen-7B": 7_615_616_512,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "outputs/Llama-3.1-8B-expert": 8_030_261_248,
}


def test_the_shipped_architectures():
    facts = yaml.safe_load(ARCHITECTURES.read_text())
    sizes = {name: model_size(AutoConfig.for_model(**fields)).num_parameters for name, fields in facts.items()}
    assert sizes == PUBLISHED


def test_where_a_config_is_from(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_config(POLICY)[1] == "its config on this machine"
    assert find_config("Qwen/Qwen2.5-3B")[1] == "architectures.yaml"
    with pytest.raises(
        ValueError, match=r"The config of 'no/where' is neither on this machine nor in architectures.yaml"
    ):
        find_config("no/where")


# ---- The dry run on data and models that are here --------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "letters.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    path_dataset(4).to_json(tmp_path / "plain.jsonl")
    expert_dataset(4).to_json(tmp_path / "with_expert.jsonl")
    return ["--model_name_or_path", POLICY, "--num_processes", "1", "--dataset_name", "plain.jsonl", "--prompt_column", "prompt",
            "--reward_funcs", "letters.letters", "letters.half", "--reward_weights", "1", "1", "--max_completion_length", "26"]  # fmt: skip


def test_what_is_here_is_looked_at(here, tmp_path):
    report = dry_run(*parsed(LORA, *here, "--expert_model_name_or_path", EXPERT))
    assert "data: plain.jsonl, 4 rows with the columns" in report
    assert f"policy: {POLICY}, 0.00e9 parameters (from its config on this machine)" in report
    assert "from 1 to 0 at step 240 of 400" in report
    assert not (tmp_path / "outputs").exists()

    report = dry_run(*parsed(PAPERS[4], *here, "--dataset_name", "with_expert.jsonl"))
    assert "; 4 rows have expert completions" in report


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (LORA, ["--reward_funcs", "boxed_accuracy", "letters.half"], "boxed_accuracy reads the column 'solution', but of the data TRL passes on only"),
        (LORA, ["--reward_funcs", "boxed_acuracy"], "reward_funcs: got 'boxed_acuracy', expected one of"),
        (LORA, ["--reward_weights", "1"], "reward_weights has 1 entries, expected one for each of the reward_funcs"),
        (LORA, ["--correctness_reward", "accuracy"], "correctness_reward must be one of the reward functions ["),
        (LORA, ["--prompt_column", "question"], "The dataset has no column 'question'"),
        (LORA, ["--gradient_accumulation_steps", "5"], "steps_per_generation=24 is no multiple of gradient_accumulation_steps=5"),
        (PAPERS[4], [], "train_dataset has no column 'expert_completions'"),
        (LORA, ["--model_name_or_path", "no/where"], "The config of 'no/where' is neither"),
    ],
)  # fmt: skip
def test_what_a_dry_run_refuses(here, monkeypatch, recipe, changes, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=re.escape(message)):
        dry_run(*parsed(recipe, *here, *changes))


@pytest.mark.parametrize("name", ["completions_ids", "kwargs", "prompt"])
def test_what_trl_gives_to_no_reward_function_is_a_column(here, tmp_path, name):
    (tmp_path / f"needs_{name}.py").write_text(f"def reward(completions, {name}): return [0.0] * len(completions)")
    message = f"needs_{name}.reward reads the column '{name}', but of the data TRL passes on only"
    with pytest.raises(ValueError, match=message):
        dry_run(*parsed(LORA, *here, "--reward_funcs", f"needs_{name}.reward", "letters.half"))


def test_what_trl_gives_to_reward_functions_needs_no_column(here, tmp_path):
    given = "prompts, completions, completion_ids, trainer_state, log_extra, log_metric, *, goal, **kwargs"
    (tmp_path / "takes_all.py").write_text(f"def reward({given}): return [0.0] * len(completions)")
    report = dry_run(*parsed(LORA, *here, "--reward_funcs", "takes_all.reward", "letters.half"))
    assert "rewards: takes_all.reward, letters.half" in report


def test_the_dry_run_from_the_command_line(monkeypatch, capsys):
    script = RECIPES / "selective_grpo.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--config", str(LORA), "--dry_run"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(script), run_name="__main__")
    assert exit.value.code is None
    report = capsys.readouterr().out
    assert report.startswith("Dry run: nothing is loaded or written.")
    assert "no sharding: fits into 24 GiB at full length" in report  # as the recipe says


def test_correctness_reward_may_be_named_as_the_recipe_names_it():
    """By its short name, which the trainer does not know."""
    assert "correctness_reward='boxed_accuracy_reward'" in dry_run(
        *parsed(LORA, "--correctness_reward", "boxed_accuracy")
    )


def test_an_expert_behind_a_server_takes_no_memory_here():
    """Nor is there a config of the name by which it is served."""
    server = ["--expert_model_server_url", "http://localhost:8000/v1", "--expert_model_name_or_path", "served"]
    report = dry_run(*parsed(PAPERS[1], *server))
    assert "expert: served, behind a server" in report
    assert "always: expert" not in report
    assert "cache of the expert" not in report


def test_an_expert_on_the_policys_base_has_a_cache_and_no_weights():
    shared = ["--expert_model_shares_base", "true", "--expert_model_name_or_path", "someone/adapter"]
    report = dry_run(*parsed(LORA, *shared, "--expert_model_init_kwargs", "{}", "--expert_model_offload", "false"))
    assert "expert: on the policy's base model, with a cache of its own" in report
    assert "always: expert" not in report
    assert "rollouts: cache of the expert" in report


def test_data_that_was_not_checked_is_the_last_word():
    assert dry_run(*parsed(LORA, "--dataset_name", "gone.jsonl")).endswith(
        "The data was not checked: gone.jsonl is not on this machine."
    )


def test_a_device_may_be_named():
    assert "no sharding: does not fit into 6 GiB." in dry_run(*parsed(LORA, "--memory_gib", "6"))


def test_where_rollouts_outgrow_the_device_half_of_the_guided_ones_wait():
    run = plan(*parsed(LORA)[1:], gib=80)
    assert re.search(
        r"^one: fits into 12 GiB while .* up to 933 tokens, then half of them wait \(4", fit(run, "one", 12)
    )
    plain = replace(run, expert=None, guided_rows=0)
    assert re.search(r"^one: fits into 8 GiB while .* up to \d+ tokens \(", fit(plain, "one", 8))
    engine = replace(run, engine_bytes=GIB, guided_rows=96)
    assert re.search(r"^one: fits into 12 GiB while .* up to \d+ tokens \(", fit(engine, "one", 12))


# ---- The LoRA recipe, trained ----------------------------------------------------------------------------------------------------------


def test_the_lora_recipe_trains(tmp_path):
    """The recipe's own file, with models, data and rewards of the quickstart: an adapter is trained, and the expert drew tokens."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.chat_template = "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    (tmp_path / "chat_reward.py").write_text(
        "def letters(completions, **kwargs): return [len(set(completion[0]['content'])) / 10 for completion in completions]"
    )
    result = launch(
        tmp_path, "--config", str(LORA), "--model_name_or_path", POLICY, "--tokenizer_name_or_path", "chat", "--eos_token", "<eos>",
        "--expert_model_name_or_path", EXPERT, "--dataset_name", "problems.jsonl", "--prompt_column", "prompt",
        "--reward_funcs", "chat_reward.letters", "--max_completion_length", "26", "--learning_rate", "1e-3",
        "--gradient_accumulation_steps", "3", "--steps_per_generation", "6", "--max_steps", "6",
        "--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--output_dir", "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "preset 'mentor'" in result.stdout
    out = tmp_path / "out"
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], sorted(adapter["target_modules"])[0]) == (32, "down_proj")
    weights = load_file(out / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)  # they start at 0
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert any(entry.get("guidance/expert_drawn", 0) > 0 for entry in history)


def test_trl_takes_the_config_of_the_llama_expert():
    parser = TrlParser((TrlScriptArguments, SFTConfig, ModelConfig))
    path = RECIPES / "Llama-3.1-8B" / "expert" / "sft.yaml"
    script, args, model = parser.parse_args_and_config(["--config", str(path), "--use_cpu", "true"])
    assert (model.model_name_or_path, script.dataset_name) == ("meta-llama/Llama-3.1-8B-Instruct", "data/llama_expert")
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 128
    guided = parsed(RECIPES / "Llama-3.1-8B" / "mentor" / "config.yaml")[1]
    assert guided.expert_model_name_or_path == args.output_dir
