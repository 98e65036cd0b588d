"""The evaluation script, started as a user starts it, and killed as a scheduler kills it."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training import EXPERT, POLICY, QUICKSTART, path_dataset, path_reward
from trl_selective.evaluation import BENCHMARKS, SamplingProtocol, TransformersBackend

SCRIPT = QUICKSTART.parent / "evaluate.py"
SETTINGS = {
    "model_name_or_path": EXPERT,
    "dataset_name": "problems.jsonl",
    "reward_func": "task.path_reward",
    "num_samples": "4",
    "temperature": "1.0",
    "max_completion_length": "26",
    "batch_size": "8",
    "output_dir": "out",
}
REWARDS = '''
def in_turn(completions, prompts, num_right, **columns):
    """Whatever they say, the first `num_right` samples of a problem are right."""
    return [float(row - prompts.index(prompt) < right) for row, (prompt, right) in enumerate(zip(prompts, num_right))]
def stuck(completions, goal, is_hard, **columns):
    return [float(9**9**9 if is_hard[0] else 1)]
def unknown(completions, **columns):
    return [None] * len(completions)
'''


def command_line(**changes) -> list[str]:
    settings = {name: value for name, value in {**SETTINGS, **changes}.items() if value is not None}
    values = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
    return [str(part) for name, parts in values.items() for part in (f"--{name}", *parts)]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs the script in this process, in a folder with problems; gives the lines of the file and the results."""
    write(tmp_path / "problems.jsonl", path_dataset(20))
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(QUICKSTART), str(SCRIPT.parent), *sys.path])
    sys.modules.pop("my_rewards", None)

    def run(name="problems", **changes):
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *command_line(**changes)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        output = tmp_path / changes.get("output_dir", "out")
        lines = [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]
        return lines, json.loads((output / "results.json").read_text())

    return run


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_hand_computed_pass_at_k(tmp_path, start, capsys):
    """
    1, 2, 3 and 0 of 4 samples are right. pass@1 = avg@4 = (1/4 + 2/4 + 3/4 + 0) / 4 = 0.375.
    pass@2 = 1 - C(wrong, 2) / C(4, 2): 1 - 3/6, 1 - 1/6, 1 - 0, 1 - 6/6, so (1/2 + 5/6 + 1 + 0) / 4 = 7/12.
    pass@4: any right at all: 3/4.
    """
    rows = [{**row, "num_right": right} for row, right in zip(path_dataset(4), (1, 2, 3, 0), strict=True)]
    write(tmp_path / "rows.jsonl", rows)
    lines, results = start("rows", dataset_name="rows.jsonl", reward_func="my_rewards.in_turn", grading_timeout=0)
    assert [line["rewards"] for line in lines][2] == [1.0, 1.0, 1.0, 0.0]
    found = results["benchmarks"]["rows"]
    means = {name: metric["mean"] for name, metric in found["metrics"].items()}
    assert means == pytest.approx({"pass@1": 0.375, "pass@2": 7 / 12, "pass@4": 0.75, "avg@4": 0.375})
    assert all(metric["low"] < metric["mean"] < metric["high"] for metric in found["metrics"].values())
    assert (found["num_problems"], found["num_samples"], found["temperature"]) == (4, 4, 1.0)
    page = (tmp_path / "out" / "results.md").read_text()
    assert page in capsys.readouterr().out
    header, _, row = (line.split("|") for line in page.splitlines() if line.startswith("|"))
    cells = dict(zip(map(str.strip, header), map(str.strip, row), strict=True))
    assert cells["pass@2, %"].startswith("58.3 [")
    assert cells["problems"] == "4"


@pytest.mark.parametrize(
    ("changes", "warns"), [({}, True), ({"apply_chat_template": "false"}, False), ({"system_prompt": "Walk."}, False)]
)
def test_plain_prompts_for_a_model_with_a_chat_template_are_pointed_out(tmp_path, start, changes, warns):
    model = tmp_path / "walker"
    shutil.copytree(EXPERT, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start(model_name_or_path="walker", max_problems="1", reward_func="my_rewards.unknown", **changes)
    said = "Prompts go to the model as plain texts, though its tokenizer has a chat template."
    assert any(str(warning.message).startswith(said) for warning in caught) == warns


@pytest.mark.parametrize("changes", [{}, {"apply_chat_template": "true"}, {"system_prompt": "Walk."}])
def test_conversations_stay_what_they_are(tmp_path, start, changes):
    model = tmp_path / "walker"
    shutil.copytree(EXPERT, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(model)
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in path_dataset(2)]
    write(tmp_path / "chats.jsonl", rows)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Prompts go to the model as plain texts")
        lines, _ = start(
            "chats",
            model_name_or_path="walker",
            dataset_name="chats.jsonl",
            reward_func="my_rewards.unknown",
            **changes,
        )
    assert [line["prompt"][0]["role"] for line in lines] == ["user"] * 2


def test_results_beside_a_model_come_into_its_card(tmp_path, start, capsys):
    """In place of earlier ones, as a table and as metadata; what else the card says stays."""
    model = tmp_path / "walker"
    shutil.copytree(EXPERT, model)
    card = "---\nlibrary_name: transformers\n---\n\n# Walker\n\nIt walks.\n\n## Training procedure\n\nLong.\n\n## Citations\n"
    (model / "README.md").write_text(card)
    for samples in ("2", "4"):
        shutil.rmtree(model / "evaluation", ignore_errors=True)
        start(model_name_or_path="walker", output_dir="walker/evaluation", num_samples=samples, max_problems="3")
    assert "They are in walker/README.md as well." in capsys.readouterr().out
    found = ModelCard.load(model / "README.md")
    assert {result.metric_name for result in found.data.eval_results} == {"pass@1", "pass@2", "pass@4", "avg@4"}
    assert found.data.model_name == "walker"
    assert found.text.count("## Evaluation") == 1
    assert "| problems | 3 | 4 |" in found.text
    words = [
        line for line in found.text.splitlines() if line and not line.startswith(("|", "## Evaluation", "In percent"))
    ]
    assert words == [line for line in card.split("---\n")[2].splitlines() if line]


def test_a_killed_run_goes_on_to_the_file_of_an_unbroken_one(tmp_path, start):
    file = tmp_path / "out" / "problems.jsonl"
    path = os.pathsep.join([str(QUICKSTART), str(QUICKSTART.parents[1])])
    command = [sys.executable, str(SCRIPT), *command_line()]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= 3):
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    # Cut into the line behind, as a kill in the middle of a write does, and between two problems that are drawn together.
    whole = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(whole[:3]) + b'{"problem": 3, "prom')
    assert not (tmp_path / "out" / "results.json").exists()

    lines, results = start()
    _, unbroken = start(output_dir="unbroken")
    assert file.read_bytes() == (tmp_path / "unbroken" / "problems.jsonl").read_bytes()
    assert results == unbroken
    assert [line["problem"] for line in lines] == list(range(20))
    assert 0.5 < results["benchmarks"]["problems"]["metrics"]["pass@1"]["mean"] < 1  # the expert's success
    for line, row in zip(lines, path_dataset(20), strict=True):
        rewards = path_reward(line["completions"], *([row[name]] * 4 for name in ("walls", "start", "goal")))
        assert (line["prompt"], line["rewards"]) == (row["prompt"], rewards)
        assert line["is_correct"] == [reward == 1 for reward in rewards]
        lengths = [
            len(text.split()) + 1 - cut for text, cut in zip(line["completions"], line["is_truncated"], strict=True)
        ]
        assert line["lengths"] == lengths  # one token for each word, and the end
        assert line["timed_out"] == [False] * 4
    assert len({text for line in lines for text in line["completions"]}) > 40


def test_another_batch_size_draws_the_same(start):
    """The models are small enough that rounding changes no token here."""
    first, _ = start()
    second, _ = start(output_dir="other", batch_size=3)
    assert first == second
    third, _ = start(output_dir="seed", seed=1)
    assert first[0]["completions"] != third[0]["completions"]


def test_an_answer_that_takes_too_long_is_wrong_and_listed(tmp_path, start, capsys):
    rows = [{**row, "is_hard": number == 1} for number, row in enumerate(path_dataset(3))]
    write(tmp_path / "rows.jsonl", rows)
    settings = {"dataset_name": "rows.jsonl", "grading_timeout": 1, "num_samples": 2}
    lines, results = start("rows", reward_func="my_rewards.stuck", **settings)
    assert [line["timed_out"] for line in lines] == [[False] * 2, [True] * 2, [False] * 2]
    assert [line["rewards"] for line in lines] == [[1.0] * 2, [None] * 2, [1.0] * 2]
    found = results["benchmarks"]["rows"]
    assert found["metrics"]["pass@1"]["mean"] == pytest.approx(2 / 3)
    assert (found["num_timed_out"], found["timed_out"]) == (2, [[1, 0], [1, 1]])
    assert found["num_without_reward"] == 0
    assert "rows: no verdict in time on (problem/sample) 1/0, 1/1; they count as wrong." in capsys.readouterr().out


def test_what_the_reward_does_not_apply_to_is_counted(start, capsys):
    _, results = start(reward_func="my_rewards.unknown", max_problems=3)
    found = results["benchmarks"]["problems"]
    assert (found["num_problems"], found["num_without_reward"], found["num_timed_out"]) == (3, 12, 0)
    assert found["metrics"]["pass@4"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert "problems: no reward for 12 completions; they count as wrong." in capsys.readouterr().out


def test_benchmarks_of_the_hub_are_sampled_as_the_paper_does(tmp_path, start, monkeypatch):
    """With folders in place of the Hub: one greedy sample of MATH-500, 32 of AIME, each with its solution and instruction."""
    write(tmp_path / "math" / "test.jsonl", [{"problem": f"{i} ?", "answer": str(i)} for i in range(3)])
    write(tmp_path / "aime" / "train.jsonl", [{"problem": f"{i} ?", "answer": f"00{i}"} for i in range(2)])
    monkeypatch.setitem(BENCHMARKS, "math500", replace(BENCHMARKS["math500"], dataset="math"))
    monkeypatch.setitem(BENCHMARKS, "aime24", replace(BENCHMARKS["aime24"], dataset="aime"))
    defaults = {"dataset_name": None, "reward_func": None, "num_samples": None, "temperature": None, "batch_size": 64}
    lines, results = start("aime24", **defaults, benchmarks=["math500", "aime24"], instruction="> 5 :")
    math, aime = results["benchmarks"]["math500"], results["benchmarks"]["aime24"]
    assert (math["num_samples"], math["temperature"], list(math["metrics"])) == (1, 0.0, ["pass@1"])
    assert (aime["num_samples"], aime["temperature"]) == (32, 0.6)
    assert list(aime["metrics"]) == [*(f"pass@{k}" for k in (1, 2, 4, 8, 16, 32)), "avg@32"]
    assert (lines[1]["prompt"], lines[1]["solution"]) == ("1 ?\n\n> 5 :", "001")
    assert len(lines[1]["completions"]) == 32
    assert set(results["benchmarks"]) == {"math500", "aime24"}
    (tmp_path / "template.jinja").write_text("{{ messages[-1]['content'] }}")
    told = {"system_prompt": "Box the answer.", "chat_template": "template.jinja", "output_dir": "told"}
    (line, *_), _ = start("math500", **defaults, benchmarks=["math500"], **told)
    assert [message["content"] for message in line["prompt"]] == ["Box the answer.", "0 ?"]  # as in training
    start(max_problems=1)  # another command adds to the results
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]) == {"math500", "aime24", "problems"}  # fmt: skip


def test_a_benchmark_that_has_changed_is_named(tmp_path, refusal, monkeypatch):
    write(tmp_path / "math" / "test.jsonl", [{"question": "1 ?", "answer": "1"}])
    monkeypatch.setitem(BENCHMARKS, "math500", replace(BENCHMARKS["math500"], dataset="math"))
    message = refusal(dataset_name=None, reward_func=None, benchmarks="math500")
    assert "math has no column 'problem', only ['answer', 'question']: it has changed." in message


def test_an_instruction_is_added_to_the_last_message(tmp_path, start):
    rows = [{"prompt": [{"role": "user", "content": "7 > 11"}], "goal": "11"}]
    write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "template.jinja").write_text("{{ messages[-1]['content'] }}{{ end or '' }}")
    settings = {"dataset_name": "rows.jsonl", "reward_func": "my_rewards.unknown", "chat_template": "template.jinja"}
    lines, _ = start("rows", **settings, instruction=":")
    assert lines[0]["prompt"] == [{"role": "user", "content": "7 > 11\n\n:"}]


def test_the_chat_template_gets_its_arguments(tmp_path, start, refusal):
    """Which the lines of the file depend on."""
    write(tmp_path / "rows.jsonl", [{"prompt": [{"role": "user", "content": "7 > 11 :"}], "goal": "11"}])
    (tmp_path / "template.jinja").write_text("{{ messages[-1]['content'] * (times or 1) }}")
    settings = {"dataset_name": "rows.jsonl", "reward_func": "my_rewards.unknown", "chat_template": "template.jinja"}
    plain, _ = start("rows", **settings, temperature=0, num_samples=1)
    twice, _ = start(
        "rows", **settings, temperature=0, num_samples=1, output_dir="twice", chat_template_kwargs='{"times": 2}'
    )
    assert plain[0]["completions"] != twice[0]["completions"]
    message = refusal(**settings, temperature=0, num_samples=1, output_dir="twice")
    assert "was made with chat_template_kwargs={'times': 2}" in message


def test_results_that_were_cut_off_are_named(tmp_path, start, refusal):
    start(max_problems=1)
    (tmp_path / "out" / "results.json").write_text("")
    assert "out/results.json is not JSON" in refusal(max_problems=1)


def save_adapter(folder):
    """The policy with LoRA weights that matter, saved without the policy."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(POLICY), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.5)
    model.save_pretrained(folder)
    return model.eval()


def test_an_adapter_is_put_on_its_base(tmp_path, start):
    model = save_adapter(tmp_path / "adapter")
    lines, results = start(model_name_or_path=str(tmp_path / "adapter"), max_problems=4)
    assert results["model"] == "adapter"
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    protocol = SamplingProtocol(num_samples=4, temperature=1.0, max_completion_length=26)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in path_dataset(4) for _ in range(4)]
    seeds = [protocol.seed_of(problem, sample) for problem in range(4) for sample in range(4)]
    token_ids = TransformersBackend(model, tokenizer).complete(prompts, seeds, protocol)
    texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    assert [text for line in lines for text in line["completions"]] == texts
    base, _ = start(model_name_or_path=POLICY, max_problems=4, output_dir="base")
    assert [text for line in base for text in line["completions"]] != texts


def test_conversations_with_a_template_of_ones_own(tmp_path, start):
    """The template writes the user's words alone, so that the completions are those of the plain prompts."""
    (tmp_path / "words.jinja").write_text(
        "{% for message in messages if message['role'] == 'user' %}{{ message['content'] }}{% endfor %}"
    )
    chat = {"chat_template": "words.jinja", "max_problems": 3, "reward_func": "my_rewards.unknown"}
    plain, _ = start(max_problems=3, output_dir="plain")
    with_system, _ = start(**chat, system_prompt="Brief.", output_dir="system")
    without, _ = start(**chat, apply_chat_template="true", output_dir="without")
    user = {"role": "user", "content": path_dataset(1)[0]["prompt"]}
    assert with_system[0]["prompt"] == [{"role": "system", "content": "Brief."}, user]
    assert without[0]["prompt"] == [user]
    texts = [[line["completions"] for line in lines] for lines in (plain, with_system, without)]
    assert texts[0] == texts[1] == texts[2]


def test_columns_and_formats(tmp_path, start):
    """A parquet file, other names of columns, numbers as answers, greedily: `\\boxed{}` is nothing that this model says."""
    rows = Dataset.from_dict({"question": ["1 > 2 :", "2 > 3 :"], "result": [2.5, 3.0]})
    rows.to_parquet(tmp_path / "rows.parquet")
    names = {"dataset_name": "rows.parquet", "prompt_column": "question", "answer_column": "result"}
    lines, results = start("rows", **names, reward_func=None, num_samples=None, temperature=None)
    assert [(line["prompt"], line["solution"], line["rewards"]) for line in lines] == [
        ("1 > 2 :", 2.5, [0.0]),
        ("2 > 3 :", 3.0, [0.0]),
    ]
    assert results["benchmarks"]["rows"]["dataset"] == "rows.parquet"


@pytest.fixture
def refusal(start, capsys):
    """The one line with which the script ends."""

    def run(**changes) -> str:
        with pytest.raises(SystemExit, match="2"):
            start(**changes)
        *_, message, advice = capsys.readouterr().err.splitlines()
        assert advice == "All settings: evaluate.py --help"
        return message

    return run


def test_other_settings_than_those_of_the_file_are_refused(start, refusal):
    start(max_problems=2)
    message = refusal(max_problems=2, temperature=0.5)
    assert re.search(r"problems.jsonl was made with temperature=1.0 according to .*, got 0.5", message)
    message = refusal(max_problems=2, model_name_or_path=POLICY)
    assert (
        "results.json has results of model='expert', got 'policy'. Name another output_dir, or delete out." in message
    )
    assert "problems.jsonl has more rows than the dataset, 1." in refusal(max_problems=1)


def test_what_a_reward_function_raises_has_its_traceback(tmp_path, start):
    (tmp_path / "my_rewards.py").write_text("def broken(completions, **columns):\n    return [int('many')]\n")
    with pytest.raises(ValueError, match="invalid literal for int"):
        start(reward_func="my_rewards.broken", grading_timeout=0)


def test_weights_that_were_written_anew_are_another_model(tmp_path, start, refusal):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(POLICY), AutoTokenizer.from_pretrained(POLICY)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    start(model_name_or_path="model", max_problems=1)
    model.save_pretrained(tmp_path / "model")
    message = refusal(model_name_or_path="model", max_problems=2)
    assert "results.json has results of other weights, since the model was written again. Name another" in message


def test_without_vllm(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        ImportError, match=r"The backend 'vllm' needs vLLM, which is not installed here\. Install it with"
    ):
        start(backend="vllm")


@pytest.fixture
def engine(monkeypatch):
    """Settings for a small engine in this process."""
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    init_kwargs = {"enforce_eager": True, "max_model_len": 64, "kv_cache_memory_bytes": 1 << 26}
    return {"backend": "vllm", "vllm_init_kwargs": json.dumps(init_kwargs)}


GREEDY = {"num_samples": None, "temperature": None}


@pytest.mark.vllm
def test_vllm_finds_what_transformers_finds(start, engine):
    """Greedily the same tokens, but for ties within rounding; at temperature 1 the same success, and the same again from the same seeds."""
    ours, _ = start(**GREEDY, output_dir="transformers")
    theirs, _ = start(**GREEDY, **engine, output_dir="vllm")
    pairs = list(zip(ours, theirs, strict=True))
    assert sum(a["completions"] == b["completions"] for a, b in pairs) >= 18
    assert sum(a["lengths"] == b["lengths"] for a, b in pairs) >= 18
    assert sum(a["is_truncated"] == b["is_truncated"] for a, b in pairs) >= 18
    first, results = start(**engine, output_dir="first")
    assert 0.5 < results["benchmarks"]["problems"]["metrics"]["pass@1"]["mean"] <= 1
    again, _ = start(**engine, output_dir="again")
    assert [line["completions"] for line in first] == [line["completions"] for line in again]


@pytest.mark.vllm
def test_vllm_puts_an_adapter_on_its_base(tmp_path, start, engine):
    save_adapter(tmp_path / "adapter")
    settings = {**GREEDY, "model_name_or_path": str(tmp_path / "adapter")}
    ours, _ = start(**settings, output_dir="transformers")
    theirs, _ = start(**settings, **engine, output_dir="vllm")
    assert sum(a["completions"] == b["completions"] for a, b in zip(ours, theirs, strict=True)) >= 18
