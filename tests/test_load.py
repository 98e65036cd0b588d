"""Many prompts, and many steps: neither memory nor open files grow with them."""

import json
import os
import subprocess
import sys

import pytest

from tests.training import QUICKSTART, expert_dataset

ROOT = QUICKSTART.parents[1]
MEGABYTE = 2**20

RUN = """
import json, os, sys
from datasets import load_dataset
from transformers import TrainerCallback
from tests.training import make_trainer

class Usage(TrainerCallback):  # memory (without the mapped files that the system may drop) and open files after each step
    def __init__(self):
        self.memory, self.files = [], []
    def on_step_end(self, args, state, control, **kwargs):
        self.memory.append(1024 * int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]))
        self.files.append(len(os.listdir("/proc/self/fd")))

folder, streaming, steps, changes = sys.argv[1], sys.argv[2] == "streaming", int(sys.argv[3]), json.loads(sys.argv[4])
usage = Usage()
rows = load_dataset("json", data_files=f"{folder}/rows.jsonl", split="train", streaming=streaming, cache_dir=f"{folder}/cache")
trainer = make_trainer(f"{folder}/out", train_dataset=rows, max_steps=steps, init={"callbacks": [usage]}, num_guided_generations=1, num_injected_completions=1, injection_trigger="always",
                       **changes)
trainer.train()
json.dump({"memory": usage.memory, "files": usage.files, "left": sorted(os.listdir(f"{folder}/out"))}, open(f"{folder}/usage.json", "w"))
"""


def usage(folder, num_prompts: int, how: str, steps: int, **changes) -> dict:
    """What a run used that reads so many prompts with eight expert completions of some length each from a file."""
    folder.mkdir()
    rows = list(expert_dataset(64))
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(num_prompts):
            row = rows[number % len(rows)]
            answers = [f"{row['expert_completions'][0]}{' ~' * 500} {number} {k}" for k in range(8)]
            file.write(json.dumps({**row, "expert_completions": answers}) + "\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    changes = {"overlong_expert_completions": "truncate", **changes}
    command = [sys.executable, "-c", RUN, str(folder), how, str(steps), json.dumps(changes)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "usage.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["streaming", "mapped"])
def test_ten_thousand_prompts_need_no_more_memory_than_three_thousand(tmp_path, how):
    """10,000 prompts have 90 MB of completions, 3,000 have 27."""
    few, many = (usage(tmp_path / str(number), number, how, steps=5) for number in (3_000, 10_000))
    print({"memory of 3,000 prompts, MB": max(few["memory"]) / MEGABYTE, "of 10,000": max(many["memory"]) / MEGABYTE})
    assert max(many["memory"]) - max(few["memory"]) < 30 * MEGABYTE


@pytest.mark.slow
def test_two_hundred_steps_leave_memory_and_files_as_they_were(tmp_path):
    found = usage(tmp_path / "run", 100, "mapped", steps=200, save_strategy="steps", save_steps=20, save_total_limit=2)
    memory, files = found["memory"], found["files"]
    print({"memory after 50 steps, MB": memory[49] / MEGABYTE, "after 200": memory[-1] / MEGABYTE})
    assert memory[-1] - memory[49] < 30 * MEGABYTE
    assert files[-1] <= files[49]
    assert found["left"] == ["README.md", "checkpoint-180", "checkpoint-200"]
