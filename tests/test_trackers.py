"""What arrives at experiment trackers that work without a network. Skipped where the tracker is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = """
import sys
from tests.training import INJECTED, expert_dataset, make_trainer

settings = {"settings": INJECTED, "num_guided_generations": 1, "entropy_threshold_init": 1.0, "max_steps": 2}
trainer = make_trainer(
    sys.argv[1], **settings, train_dataset=expert_dataset(), log_completions=True, report_to=sys.argv[2], project="walks", run_name="first"
)
trainer.train()
"""
COLUMNS = ["step", "prompt", "completion", "path_reward", "guided", "expert_drawn", "injected", "injection_source", "injection_selector",
           "injection_score", "advantage"]  # fmt: skip


def train(folder, tracker, **environment) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    command = [sys.executable, "-c", TRAIN, str(folder / "out"), tracker]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def check_table(rows: list[dict]) -> None:
    """16 rollouts, the last of each group of 4 guided, up to one of each injected, perhaps in place of the guided one."""
    assert len(rows) == 16
    assert set(rows[0]) == set(COLUMNS)
    assert [row["guided"] for row in rows] == [n % 4 == 3 and not row["injected"] for n, row in enumerate(rows)]
    assert sum(row["expert_drawn"] for row in rows if row["guided"]) > 0
    assert not any(row["expert_drawn"] for row in rows if not row["guided"])
    injected = [row for row in rows if row["injected"]]
    assert injected
    assert {row["injection_selector"] for row in injected} == {"random"}
    assert all(0 <= row["injection_score"] <= 1 for row in injected)


def test_wandb(tmp_path):
    pytest.importorskip("wandb")
    train(tmp_path, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    tables = [json.loads(path.read_text()) for path in tmp_path.rglob("completions_*.table.json")]
    by_step = {table["data"][0][table["columns"].index("step")]: table for table in tables}
    assert set(by_step) == {1, 2}
    for table in by_step.values():
        check_table([dict(zip(table["columns"], row, strict=True)) for row in table["data"]])


def test_trackio(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    train(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    read = "import json, trackio; print(json.dumps(trackio.SQLiteStorage.get_logs('walks', 'first')))"
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    result = subprocess.run([sys.executable, "-c", read], env=environment, capture_output=True, text=True, check=True)
    logs = json.loads(result.stdout)
    tables = [entry["completions"]["_value"] for entry in logs if "completions" in entry]
    assert {table[0]["step"] for table in tables} == {1, 2}
    for table in tables:
        check_table(table)
    assert [entry["train/guidance/coef"] for entry in logs if "train/guidance/weight" in entry] == [1.0, 1.0]
