"""The two scripts of the migration: they run, and they differ as the page beside them says."""

import difflib
import json
import re
import runpy

import pytest

from tests.training import EXPERT, POLICY, QUICKSTART, path_dataset
from trl_selective import SelectiveGuidanceGRPOTrainer

FOLDER = QUICKSTART.parent / "migration"


def difference() -> list[str]:
    scripts = [(FOLDER / name).read_text().splitlines() for name in ("grpo.py", "guided.py")]
    return [line for line in difflib.ndiff(*scripts) if line.startswith(("+ ", "- "))]


def test_the_page_prints_the_difference():
    printed = re.search(r"^```diff\n(.*?)^```$", (FOLDER / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    assert [f"{line[0]} {line[1:]}" for line in printed.splitlines()] == difference()


def test_three_lines_are_new():
    assert [line[0] for line in difference()].count("+") == 3
    assert [line[0] for line in difference()].count("-") == 1


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The quickstart's models, and problems whose solution is the expert's filler word."""
    rows = path_dataset(8).rename_column("prompt", "problem")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row | {"solution": "~"}) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    for name, value in {"MODEL": POLICY, "EXPERT": EXPERT, "DATA": "data.jsonl", "MAX_STEPS": "3"}.items():
        monkeypatch.setenv(name, value)


def test_the_script_of_trl_runs(small):
    trainer = runpy.run_path(str(FOLDER / "grpo.py"))["trainer"]
    assert trainer.state.global_step == 3
    assert not isinstance(trainer, SelectiveGuidanceGRPOTrainer)


def test_the_guided_script_runs_and_is_guided(small):
    with pytest.warns(UserWarning, match="The expert was made for texts of 64 tokens"):  # and TRL's default is 512
        trainer = runpy.run_path(str(FOLDER / "guided.py"))["trainer"]
    assert trainer.state.global_step == 3
    logged = [entry for entry in trainer.state.log_history if "guidance/reward/guided" in entry]
    assert logged  # from the second batch on, until alpha is 0
    assert all(entry["guidance/expert_drawn"] > 0 for entry in logged)
