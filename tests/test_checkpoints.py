"""A run goes on from the last checkpoint that was written to its end, wherever it was killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training import QUICKSTART, length_reward, make_trainer
from trl_selective.checkpoints import checkpoint_to_resume, damage, way_on
from trl_selective.state import STATE_FILE

ROOT = QUICKSTART.parents[1]


def cut(path):
    """Half of a file, as a full disk or a power cut leaves it."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "trainer_state.json is missing": lambda folder: (folder / "trainer_state.json").unlink(),
    "trainer_state.json is damaged": lambda folder: cut(folder / "trainer_state.json"),
    "optimizer.pt is cut off": lambda folder: cut(folder / "optimizer.pt"),
    "rng_state.pth is cut off": lambda folder: cut(folder / "rng_state.pth"),
    "model.safetensors is cut off": lambda folder: cut(folder / "model.safetensors"),
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """With the checkpoints of three steps, and folders that are none."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, max_steps=3, save_strategy="steps", save_steps=1, reward_funcs=length_reward).train()
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-9").write_text("a file")
    return folder


@pytest.fixture
def run(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "run")


@pytest.mark.parametrize("reason", DAMAGES)
def test_what_was_not_written_to_its_end_is_passed_over(run, reason):
    DAMAGES[reason](run / "checkpoint-3")
    assert damage(run / "checkpoint-3") == reason
    with pytest.warns(UserWarning, match=rf"Resuming from checkpoint-2, since checkpoint-3 .* \({reason}\)"):
        assert checkpoint_to_resume(True, str(run)) == str(run / "checkpoint-2")


def test_the_way_on_is_a_checkpoint_of_this_run(run):
    began = (run / "checkpoint-2" / "trainer_state.json").stat().st_mtime
    assert way_on(str(run), 4, since=began).endswith(f"with resume_from_checkpoint='{run}/checkpoint-3'.")
    cut(run / "checkpoint-3" / "optimizer.pt")
    assert way_on(str(run), 4, since=began).endswith(f"with resume_from_checkpoint='{run}/checkpoint-2'.")
    later = began + 1000
    assert way_on(str(run), 0, since=later).endswith("start it again: it has no checkpoint.")
    resumed = way_on(str(run), 2, since=later, resumed_from="elsewhere/checkpoint-2")
    assert resumed.endswith("with resume_from_checkpoint='elsewhere/checkpoint-2'.")


def test_an_error_names_no_checkpoint_of_another_run(run):
    def broken(**columns):
        raise KeyError("answer")

    trainer = make_trainer(run, reward_funcs=broken, max_steps=5)
    with pytest.raises(KeyError) as error:
        trainer.train()
    assert "start it again: it has no checkpoint." in error.value.__notes__[-1]


def test_whole_checkpoints_are_taken_as_they_are(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint_to_resume(True, str(run)) == str(run / "checkpoint-3")
        assert checkpoint_to_resume(str(run / "checkpoint-1"), str(run)) == str(run / "checkpoint-1")
        for nothing in (None, False):
            assert checkpoint_to_resume(nothing, str(run)) is nothing


def test_the_highest_number_is_the_last(tmp_path, run_folder):
    for number in (2, 10):
        shutil.copytree(run_folder / "checkpoint-1", tmp_path / f"checkpoint-{number}")
    assert checkpoint_to_resume(True, str(tmp_path)) == str(tmp_path / "checkpoint-10")


def test_training_goes_on_from_the_last_whole_one(run):
    expected = load_file(run / "checkpoint-3" / "model.safetensors")
    DAMAGES["trainer_state.json is missing"](run / "checkpoint-3")
    save_file({"garbage": torch.zeros(1)}, run / "checkpoint-3" / "model.safetensors")
    trainer = make_trainer(run, max_steps=3, save_strategy="steps", save_steps=1, reward_funcs=length_reward)
    with pytest.warns(UserWarning, match="Resuming from checkpoint-2"):
        trainer.train(resume_from_checkpoint=True)
    assert damage(run / "checkpoint-3") is None
    resumed = load_file(run / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


# ---- Killed runs of two processes ------------------------------------------------------------------------------------------------------

STEPS = 5
CALLS = {  # moment -> how often it comes in a run, in the main process and in the other one
    "generation": (STEPS - 1, STEPS - 1),  # without a threshold, the first batch is not guided
    "reward": (2 * STEPS, 2 * STEPS),  # of rollouts and of expert completions
    "backward": (STEPS, STEPS),
    "weights": (STEPS, STEPS),
    "checkpoint": (3 * STEPS, STEPS),
    "state": (STEPS, 0),
}
NEVER = ("never", 0, 0)


def launch(folder, moment: str, call: int, rank: int) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "tests" / "killed_run.py"]
    command = [sys.executable, *launcher, folder, STEPS, moment, call, rank]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, QUICKSTART))),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    result = launch(folder, *NEVER)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / f"checkpoint-{STEPS}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_two_processes_killed_anywhere_end_as_an_unbroken_run(tmp_path, unbroken, seed):
    """Mixed and injected rows, a selector that learns: parameters and state are those of the unbroken run, bit for bit."""
    rng = random.Random(seed)
    moment = list(CALLS)[seed % len(CALLS)]
    rank = rng.choice([rank for rank in (0, 1) if CALLS[moment][rank]])
    result = launch(tmp_path, moment, rng.randint(1, CALLS[moment][rank]), rank)
    assert result.returncode != 0
    assert f"exitcode  : -{signal.SIGKILL.value}" in result.stderr
    result = launch(tmp_path, *NEVER)
    if "Start anew" in result.stderr:
        assert "No checkpoint in" in result.stderr
        for checkpoint in tmp_path.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        result = launch(tmp_path, *NEVER)
    assert result.returncode == 0, result.stderr[-3000:]
    ours, expected = (load_file(path / "model.safetensors") for path in (tmp_path / f"checkpoint-{STEPS}", unbroken))
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    states = [json.loads((path / STATE_FILE).read_text()) for path in (tmp_path / f"checkpoint-{STEPS}", unbroken)]
    assert states[0] == states[1]
