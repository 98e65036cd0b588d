"""Pushing to the Hub, with the real client in a process of its own and a stand-in for the server."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.hub import TOKEN, USER, Hub
from tests.recipes.test_selective_grpo import launch
from tests.training import POLICY
from trl_selective import SelectiveGuidanceGRPOConfig

MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training_args.bin"}  # fmt: skip
CARD = {"README.md", "training_dynamics.png"}
PUSH = """
import sys
from huggingface_hub import ModelCard
from transformers import pipeline
from tests.training import make_plain_trainer, make_trainer
from trl_selective import SelectiveGuidanceGRPOTrainer

folder, token = sys.argv[1:]
trainer = make_trainer(f"{folder}/walker", max_steps=2, save_strategy="steps", save_steps=1, hub_private_repo=True, pictures=True)
trainer.train()
trainer.push_to_hub(dataset_name="someone/paths")
ModelCard.load("someone/walker").validate()
generator = pipeline("text-generation", model="someone/walker")
print("ANSWER", generator("2 7 8 13 17 20 25 28 33 0 > 21 :", max_new_tokens=9, return_full_text=False)[0]["generated_text"])

pushing = {"push_to_hub": True, "hub_model_id": "lab/walker", "hub_token": token, "hub_always_push": True}
trainer = make_trainer(f"{folder}/checkpoints", **pushing, max_steps=3, save_strategy="steps", save_steps=2, pictures=True)
trainer.train()
trainer.push_to_hub()

trainer = make_plain_trainer(f"{folder}/plain", SelectiveGuidanceGRPOTrainer, max_steps=1, pictures=True)
trainer.train()
trainer.push_to_hub()
"""


def online(hub, home: Path) -> dict[str, str]:
    """The environment of a client: without Xet, whose storage the stand-in does not have."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """What one process pushed, what it printed, and the folder it worked in."""
    folder = tmp_path_factory.mktemp("pushed")
    with Hub() as hub:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **online(hub, folder / "home")}
        command = [sys.executable, "-c", PUSH, str(folder), TOKEN]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return hub, result.stdout, folder


def test_a_guided_model_arrives(pushed):
    hub, _, folder = pushed
    assert [message for repo, message, _ in hub.commits if repo == f"{USER}/walker"] == ["End of training"]
    files = hub.repos[f"{USER}/walker"]
    assert set(files) == MODEL | CARD | {"trainer_state.json"}  # no checkpoints with their optimizers
    assert files["training_dynamics.png"] == (folder / "walker" / "training_dynamics.png").read_bytes()
    assert "guidance/weight" in json.loads(files["trainer_state.json"])["log_history"][0]


def test_its_card_is_the_whole_one(pushed):
    hub, _, folder = pushed
    card = ModelCard(hub.repos[f"{USER}/walker"]["README.md"].decode())
    assert f'model="{USER}/walker"' in card.text
    assert "### What guidance did" in card.text
    assert "![Training dynamics](training_dynamics.png)" in card.text
    assert card.data.datasets == "someone/paths"
    assert not [place for place in (str(folder), POLICY, TOKEN) if place in card.content]
    assert ("POST", "/api/validate-yaml") in hub.requests


def test_what_was_pushed_answers(pushed):
    assert len(next(line for line in pushed[1].splitlines() if line.startswith("ANSWER")).split()) > 3


def test_checkpoints_have_the_card_of_their_step(pushed):
    hub, _, _ = pushed
    commits = [(message, files) for repo, message, files in hub.commits if repo == "lab/walker"]
    messages = ["Training in progress, step 2", "Training in progress, step 3", "End of training"]
    assert [message for message, _ in commits] == messages
    lines = [files["README.md"].decode().splitlines() for _, files in commits]
    steps = [next(line for line in card if "optimizer steps" in line) for card in lines]
    assert steps == ["| optimizer steps | 2 of 3 |", "| optimizer steps | 3 |", "| optimizer steps | 3 |"]
    assert all(
        {"# Model Card for walker", "![Training dynamics](training_dynamics.png)"} <= set(card) for card in lines
    )
    assert set(hub.repos["lab/walker"]) == MODEL | CARD | {"trainer_state.json"}


def test_no_key_arrives(pushed):
    """Not even the one in the arguments, which the trainer saves beside the model."""
    for files in pushed[0].repos.values():
        assert TOKEN.encode() not in b"".join(files.values())
    keys = {"hub_token": TOKEN, "model_init_kwargs": {"token": TOKEN, "dtype": "float32"}}
    args = SelectiveGuidanceGRPOConfig("out", use_cpu=True, bf16=False, **keys)
    saved = pickle.loads(pickle.dumps(args))
    assert (saved.output_dir, saved.hub_token, saved.model_init_kwargs) == ("out", None, {"dtype": "float32"})
    assert (args.hub_token, args.model_init_kwargs["token"]) == (TOKEN, TOKEN)


def test_without_guidance_it_is_trls_push(pushed):
    files = pushed[0].repos[f"{USER}/plain"]
    assert set(files) == MODEL | CARD
    assert "trained with GRPO, a method introduced in" in files["README.md"].decode()


def test_the_recipe_pushes_all_at_once(tmp_path):
    options = ("--push_to_hub", "--hub_model_id", "lab/walker", "--preset", "mentor_corrected")
    with Hub() as hub:
        result = launch(tmp_path, *options, **online(hub, tmp_path / "home"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert [(repo, message) for repo, message, _ in hub.commits] == [("lab/walker", "End of training")]
    files = hub.repos["lab/walker"]
    assert set(files) == MODEL | CARD | {"trainer_state.json"}
    card = files["README.md"].decode()
    assert "`min(r, inf)`, `r = policy / mixture` | trl-selective |" in card
    assert "`letters` (weight 1), `half` (weight 0.5)" in card
    assert str(tmp_path) not in card
