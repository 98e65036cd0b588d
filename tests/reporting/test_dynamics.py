"""`python -m trl_selective.reporting dynamics`, and the picture that a run leaves behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import image

from tests.reporting.figures import names, panels, points
from tests.training import make_trainer
from trl_selective.reporting.__main__ import main
from trl_selective.reporting.dynamics import read_log_history

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A guided run of three steps with checkpoints, whose log was not saved at its end."""
    folder = tmp_path_factory.mktemp("runs") / "guided"
    trainer = make_trainer(
        folder, save_strategy="steps", save_steps=2, log_completions=True, num_completions_to_print=0, pictures=True
    )
    trainer.train()
    return trainer


@pytest.fixture
def run(trained, tmp_path):
    """Its output folder, to do with as one likes."""
    return shutil.copytree(trained.args.output_dir, tmp_path / "guided")


def write_state(folder, steps):
    folder.mkdir(parents=True, exist_ok=True)
    history = [{"step": step, "reward": float(step)} for step in range(1, steps + 1)]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": steps, "log_history": history}))
    return str(folder)


def test_the_picture_at_the_end_of_training(trained, drawn):
    """It is there, and shows all steps of this run."""
    path = Path(trained.args.output_dir, "training_dynamics.png")
    assert image.imread(path).std() > 0
    assert trained._save_picture() is None
    assert drawn[0].get_suptitle() == "guided"
    rewards = points(panels(drawn[0])["reward of the policy"].lines[0])
    assert rewards == [(entry["step"], entry["reward"]) for entry in trained.state.log_history[:3]]
    assert "guidance coefficient" in panels(drawn[0])


def test_other_processes_draw_nothing(tmp_path, drawn, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=1, pictures=True)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.train()
    assert not drawn


def test_training_does_not_fail_where_nothing_was_logged(tmp_path, caplog):
    trainer = make_trainer(tmp_path / "a", max_steps=1, logging_strategy="no", pictures=True)
    trainer.train()
    assert not (tmp_path / "a" / "training_dynamics.png").exists()
    (record,) = [record for record in caplog.records if record.name == "trl_selective.trainer"]
    assert "No picture of the training dynamics: None of the runs ['a'] logged a metric" in record.getMessage()


def test_command_on_a_run_that_has_not_ended(run, tmp_path):
    """The checkpoint after the second step is all that there is."""
    shutil.rmtree(run / "checkpoint-3")
    command = [
        sys.executable,
        "-m",
        "trl_selective.reporting",
        "dynamics",
        str(run),
        "--output",
        str(tmp_path / "a.pdf"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"Wrote {tmp_path / 'a.pdf'}\n"
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF-")
    assert [entry["step"] for entry in read_log_history(run)] == [1, 2]


def test_command_on_a_run_that_has_ended(trained, run, tmp_path, drawn):
    trained.state.save_to_json(str(run / "trainer_state.json"))
    main(["dynamics", str(run), "--metrics", "entropy", "guidance/re*", "--output", str(tmp_path / "a.svg")])
    history = trained.state.log_history[:3]
    assert points(panels(drawn[0])["entropy"].lines[0]) == [(entry["step"], entry["entropy"]) for entry in history]
    assert set(panels(drawn[0])) == {
        "entropy",
        "guidance/rescued_groups",
        "guidance/reward/guided",
        "guidance/reward/on_policy",
    }


def test_command_on_what_a_run_logged_of_its_rollouts(run, tmp_path, capsys):
    """TRL's tables of completions: half of the rollouts are the policy's own."""
    main(["words", "--trained", str(run), "--words", "~", "D", "--output", str(tmp_path / "w.png")])
    assert "guided, steps 1-1 | guided, steps 3-3" in capsys.readouterr().out
    assert image.imread(tmp_path / "w.png").std() > 0


def test_several_runs_in_one_picture(tmp_path, drawn):
    runs = [write_state(tmp_path / "a", 3), f"other={write_state(tmp_path / 'b', 2)}"]
    main(["dynamics", *runs, "--output", str(tmp_path / "a.png")])
    assert names(drawn[0].legends[0]) == ["a", "other"]
    assert [points(line) for line in drawn[0].axes[0].lines] == [[(1, 1), (2, 2), (3, 3)], [(1, 1), (2, 2)]]


def test_what_is_ahead_is_read(tmp_path):
    """The last checkpoint by number, not by name; the folder's own file unless training went on after it."""
    for steps in (9, 10):
        write_state(tmp_path / f"checkpoint-{steps}", steps)
    write_state(tmp_path / "checkpoint-best", 11)
    assert len(read_log_history(tmp_path)) == 10
    write_state(tmp_path, 5)
    assert len(read_log_history(tmp_path)) == 10
    write_state(tmp_path, 12)
    assert len(read_log_history(tmp_path)) == 12


def fails(capsys, *arguments):
    """What is said when it ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(["dynamics", *arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_bad_input(tmp_path, capsys):
    assert "There is no nowhere. Expected a path, or NAME=PATH" in fails(capsys, "nowhere")
    assert f"{tmp_path} has no trainer_state.json, and no checkpoint in it has. Expected the `output_dir`" in fails(
        capsys, str(tmp_path)
    )
    run = write_state(tmp_path / "a", 2)
    assert "Nothing was logged as ['entropy']. Metrics that were: ['reward']." in fails(
        capsys, run, "--metrics", "entropy"
    )
    assert "smooth must be at least 1, got 0" in fails(capsys, run, "--smooth", "0")
    assert "None of the runs ['b'] logged a metric of GRPO" in fails(capsys, write_state(tmp_path / "b", 0))
    (tmp_path / "b" / "trainer_state.json").write_text("[]")
    assert "is not what `trainer.save_state()` writes" in fails(capsys, str(tmp_path / "b"))
    (tmp_path / "b" / "trainer_state.json").write_text('{"global_st')
    assert "is not JSON" in fails(capsys, str(tmp_path / "b"))


def test_without_matplotlib(tmp_path, capsys, without_matplotlib):
    assert 'pip install "trl-selective[plots]"' in fails(capsys, write_state(tmp_path / "a", 2))


def test_bad_input_from_the_shell(tmp_path):
    command = [sys.executable, "-m", "trl_selective.reporting"]
    result = subprocess.run([*command, "dynamics", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("python -m trl_selective.reporting: ")
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=ROOT).stdout
    assert all(name in helped for name in ("dynamics", "pass_at_k", "words"))
