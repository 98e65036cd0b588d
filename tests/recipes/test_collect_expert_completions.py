"""The script that collects expert completions, started as a user starts it, and killed as a scheduler kills it."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
from transformers import AutoTokenizer

from tests.endpoint import Endpoint
from tests.training import EXPERT, POLICY, QUICKSTART, path_dataset

SCRIPT = QUICKSTART.parent / "collect_expert_completions.py"
SETTINGS = {
    "dataset_name": "problems.jsonl",
    "expert_model_name_or_path": EXPERT,
    "reward_funcs": "task.path_reward",
    "num_completions": "2",
    "max_completion_length": "26",
    "batch_size": "8",
    "output_file": "data/with_expert.jsonl",
}


def command_line(**changes) -> list[str]:
    return [part for name, value in {**SETTINGS, **changes}.items() for part in (f"--{name}", value)]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs the script in this process, in a folder with problems."""
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in path_dataset(48)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(QUICKSTART), str(SCRIPT.parent), *sys.path])

    def run(**changes):
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *command_line(**changes)])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


def test_a_killed_run_goes_on_to_the_file_of_an_unbroken_one(tmp_path, start, capsys):
    file = tmp_path / "data" / "with_expert.jsonl"
    path = os.pathsep.join([str(QUICKSTART), str(QUICKSTART.parents[1])])  # where task.path_reward and the package are
    command = [sys.executable, str(SCRIPT), *command_line()]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= 6):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    written = file.read_bytes().count(b"\n")
    assert 6 <= written < 48

    start()
    output = capsys.readouterr().out
    assert f"48 rows are in data/with_expert.jsonl, {written} of them from an earlier run. In this run:" in output
    assert f"{2 * (48 - written)} completions drawn" in output

    start(output_file="unbroken.jsonl")
    assert file.read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()
    rewards = [reward for line in file.read_text().splitlines() for reward in json.loads(line)["expert_rewards"]]
    output = capsys.readouterr().out
    assert f"96 completions drawn, {sum(rewards) / len(rewards):.1%} of {len(rewards)} right" in output
    assert f"{96 - len(rewards)} dropped, cut off or empty" in output


def test_an_endpoint_with_a_system_prompt_and_only_right_answers(tmp_path, start, capsys):
    """The prompt becomes a conversation, once; the completions are left as they are."""
    with Endpoint(lambda prompt, seed, length, temperature: (f"{prompt} {seed % 2}", "stop")) as endpoint:
        (tmp_path / "even.py").write_text(
            "def even(completions, **columns):\n    return [float(each[0]['content'].endswith('0')) for each in completions]\n"
        )
        start(
            base_url=endpoint.url,
            expert_model_name_or_path="served",
            system_prompt="Find a path.",
            reward_funcs="even.even",
            reward_weights="2.0",
            only_above="0.5",
            concurrency="3",
        )
    lines = [json.loads(line) for line in (tmp_path / SETTINGS["output_file"]).read_text().splitlines()]
    for line, row in zip(lines, path_dataset(48), strict=True):
        system, user = line["prompt"]
        assert (system["content"], user["content"]) == ("Find a path.", row["prompt"])
        for completion in line["expert_completions"]:
            assert completion == [{"role": "assistant", "content": f"{row['prompt']} 0"}]
        assert set(line["expert_sources"]) <= {"served"}
        assert set(line["expert_rewards"]) <= {2.0}
        assert not any(line["expert_logprobs"])
    kept = sum(len(line["expert_completions"]) for line in lines)
    assert 0 < kept < 96
    assert f"{kept} kept, {kept} of them without log-probabilities" in capsys.readouterr().out


def test_the_chat_template_gets_its_arguments(tmp_path, start):
    (tmp_path / "liked.py").write_text("def liked(completions, **columns):\n    return [1.0] * len(completions)\n")
    with Endpoint(lambda prompt, *question: (prompt, "stop")) as endpoint:
        start(
            base_url=endpoint.url,
            expert_model_name_or_path="served",
            reward_funcs="liked.liked",
            system_prompt="Find a path.",
            chat_template_kwargs='{"enable_thinking": false}',
        )
    assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for _, body in endpoint.requests)


def test_texts_for_an_expert_with_a_chat_template_are_pointed_out(tmp_path, start):
    tokenizer = AutoTokenizer.from_pretrained(EXPERT)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    shutil.copytree(EXPERT, tmp_path / "expert")
    tokenizer.save_pretrained(tmp_path / "expert")
    with pytest.warns(
        UserWarning, match="as plain texts, though its tokenizer has a chat template.*set system_prompt"
    ):
        start(expert_model_name_or_path=str(tmp_path / "expert"))


def test_a_server_that_breaks_down_ends_it_with_one_line(start, capsys):
    """So does a file of other settings; what is there is kept for the next run."""
    settings = {"expert_model_name_or_path": "served", "max_retries": "0"}
    with Endpoint(lambda prompt, *question: (prompt, "stop"), lambda *request: (500, {}, "{}")) as endpoint:
        with pytest.raises(SystemExit, match="2"):
            start(base_url=endpoint.url, **settings)
        assert "error: Row 0 got no completion from 'served' (max_retries=0): " in capsys.readouterr().err
        with pytest.raises(SystemExit, match="2"):
            start(base_url=endpoint.url, **settings, num_completions="1")
    assert "with_expert.jsonl was made with num_completions=2 according to" in capsys.readouterr().err


def test_another_policy_ends_otherwise(tmp_path, start, capsys):
    """`eos_token` is that of the policy's tokenizer, as in training: no completion of the expert ends with it."""
    start(policy_tokenizer_name_or_path=POLICY, eos_token="~", output_file="out.jsonl", batch_size="96", seed="3")
    kept, without = re.search(r"(\d+) kept, (\d+) of them without", capsys.readouterr().out).groups()
    assert kept == without
    assert int(kept) > 0
    assert json.loads((tmp_path / ".out.jsonl.settings").read_text())["eos_token"] == "~"
