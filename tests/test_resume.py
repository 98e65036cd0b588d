"""Nothing is lost: a run that is killed between two checkpoints and resumed ends where an unbroken one ends."""

import json
import os
import signal
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file

from tests.training import QUICKSTART, length_reward, make_trainer
from trl_selective.state import STATE_FILE

ROOT = QUICKSTART.parents[1]

RUN = """
import sys, time
from tests.training import make_trainer, length_reward
from transformers import TrainerCallback

class SlowDown(TrainerCallback):  # so that the signal meets it between two checkpoints
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(float(sys.argv[2]))

trainer = make_trainer(
    sys.argv[1], max_steps=8, save_strategy="steps", save_steps=3, reward_funcs=length_reward, entropy_threshold_init=None,
    guidance_schedule="cosine", guidance_steps=7, guided_importance_correction="token_truncate", guidance_weight_max=0.9,
    guided_sampler="speculative", draft_length=3, init={"callbacks": [SlowDown()]},
)
trainer.train(resume_from_checkpoint=len(sys.argv) > 3)
trainer.save_model(sys.argv[1])
"""


def start(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", RUN, str(folder), *arguments], cwd=ROOT, env=environment)


def test_a_killed_run_resumes_to_the_same_parameters(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole, "0").wait(timeout=120) == 0

    process = start(broken, "0.5")
    deadline = time.monotonic() + 120
    while not (broken / "checkpoint-3" / "trainer_state.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.6)  # into step 5
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (broken / "checkpoint-6").exists()

    assert start(broken, "0", "resume").wait(timeout=120) == 0
    ours, expected = (load_file(folder / "model.safetensors") for folder in (broken, whole))
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    states = [json.loads((folder / "checkpoint-8" / STATE_FILE).read_text()) for folder in (broken, whole)]
    assert states[0] == states[1]
    assert states[0]["entropy_threshold"] > 0


def saved(folder, **changes):
    trainer = make_trainer(
        folder, max_steps=2, save_strategy="steps", save_steps=1, reward_funcs=length_reward, **changes
    )
    trainer.train()
    return folder / "checkpoint-1"


def test_a_guided_checkpoint_continues_without_guidance(tmp_path):
    checkpoint = saved(tmp_path)
    trainer = make_trainer(tmp_path, num_guided_generations=0, max_steps=3)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 3


def test_what_is_pushed_with_a_checkpoint_holds_the_state(tmp_path, monkeypatch):
    pushed = []
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "_push_from_checkpoint", lambda folder: pushed.append(set(os.listdir(folder))))
    monkeypatch.setattr(trainer, "push_to_hub", lambda *args, **kwargs: None)
    trainer.train()
    assert STATE_FILE in pushed[0]
