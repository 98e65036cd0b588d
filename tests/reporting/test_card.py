"""The model card, as trainers write it."""

import json
import re
import sys
import warnings
from concurrent.futures import Future
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from transformers import TrainerCallback
from transformers.utils import PushInProgress
from trl import GRPOConfig, GRPOTrainer

from tests.hub import TOKEN, Hub
from tests.training import (
    EXPERT,
    INJECTED,
    PLAIN,
    POLICY,
    QUICKSTART,
    expert_dataset,
    make_plain_trainer,
    make_trainer,
)
from trl_selective import SelectiveGuidanceGRPOConfig, SelectiveGuidanceGRPOTrainer

RESULTS = {
    "model": "/home/me/out",
    "benchmarks": {
        "paths": {
            "dataset": "/home/me/paths.jsonl",
            "split": "test",
            "num_problems": 128,
            "num_samples": 32,
            "temperature": 1.0,
            "num_timed_out": 0,
            "metrics": {
                "pass@1": {"mean": 0.51388, "low": 0.4512, "high": 0.58},
                "pass@16": {"mean": 0.918, "low": 0.881, "high": 0.95},
            },
        },
        "MATH-500": {
            "dataset": "HuggingFaceH4/MATH-500",
            "split": "test",
            "num_problems": 500,
            "num_samples": 1,
            "temperature": 0.0,
            "num_timed_out": 3,
            "metrics": {"pass@1": {"mean": 0.25, "low": 0.2, "high": 0.3}},
        },
    },
}


def write_results(folder, results=RESULTS):
    (folder / "evaluation").mkdir(parents=True, exist_ok=True)
    (folder / "evaluation" / "results.json").write_text(json.dumps(results))


def card_of(trainer, **options) -> str:
    trainer.create_model_card(**{"model_name": "walker", **options})
    return Path(trainer.args.output_dir, "README.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The output folder of a guided run that was evaluated."""
    folder = tmp_path_factory.mktemp("guided")
    settings = {"preset": "mentor", "guidance_schedule": "cosine", "guidance_steps": 0.5, "max_steps": 4}
    expert = {"expert_model_init_kwargs": {"token": TOKEN}}
    trainer = make_trainer(folder, **settings, **expert, hub_token=TOKEN, pictures=True)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    write_results(folder)
    trainer.create_model_card(model_name="walker", dataset_name="someone/paths", tags="maze")
    return folder


@pytest.fixture
def hub(monkeypatch):
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


def test_the_hub_accepts_the_card(folder, hub):
    """And would not, if metadata were wrong."""
    card = ModelCard.load(folder / "README.md")
    card.validate()
    card.data.license = "mine"
    with pytest.raises(ValueError, match="license 'mine' is not known"):
        card.validate()
    card.data.license = None
    card.data.eval_results[0].dataset_name = None
    with pytest.raises(ValueError, match=re.escape("dataset.name is required")):
        card.validate()


def test_metadata_come_back_as_they_were_written(folder):
    data = ModelCard.load(folder / "README.md").data
    assert data.model_name == "walker"
    assert data.datasets == "someone/paths"
    assert {"trl", "grpo", "selective-guidance", "maze"} <= set(data.tags)
    assert [(r.dataset_name, r.dataset_type, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("paths", "paths", "pass@1", 0.5139),  # a file of this machine has no id
        ("paths", "paths", "pass@16", 0.918),
        ("MATH-500", "HuggingFaceH4/MATH-500", "pass@1", 0.25),
    ]
    assert {r.task_type for r in data.eval_results} == {"text-generation"}


def test_the_sections_and_their_order(folder):
    text = ModelCard.load(folder / "README.md").text
    headings = re.findall(r"^#+ .*$", text, flags=re.MULTILINE)
    assert headings == [
        "# Model Card for walker",
        "## Quick start",
        "## Evaluation",
        "## Training procedure",
        "### Selective guidance",
        "### Settings of guidance",
        "### Training set-up",
        "### What guidance did",
        "### Training dynamics",
        "### Framework versions",
        "## Citations",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "This model is a fine-tuned version of a model that is not on the Hub on the [someone/paths]",
        'generator = pipeline("text-generation", model="walker", device_map="auto")',
        "has no chat template: pass a text",
        "| paths | 128 | 32 | 51.4 [45.1, 58.0] | 91.8 [88.1, 95.0] |",
        "| [MATH-500](https://huggingface.co/datasets/HuggingFaceH4/MATH-500) | 500 | 1 | 25.0 [20.0, 30.0] |  |",
        "Sampled at temperature 1 (paths), 0 (MATH-500). 3 answers whose check timed out count as wrong.",
        "trained with MENTOR, a method introduced in [Selective Expert Guidance",
        "2 of the 4 rollouts of each prompt were drawn token by token",
        "The expert is a model that is not on the Hub (`LlamaForCausalLM`, 165,952 parameters).",
        "No expert completions were injected.",
        "| law of a guided token | `(1 - w) * policy + w * expert` | MENTOR, Eq. 6 |",
        "`gamma` the 0.95 quantile",
        "| sampler | `StepwiseSampler`: both models",
        "| advantage of guided rollouts | `alpha * max(R - mean, 0) / R_range` | MENTOR, Eq. 11 |",
        "`mean` and `std` over the on-policy rollouts of its group | MENTOR, Eq. 10 |",
        "| `alpha` | cosine from 1 to 0 over 50 % of all steps; then nothing is guided any more",
        "MENTOR is [arXiv:2510.04140](https://huggingface.co/papers/2510.04140).",
        "Preset `mentor`, but for `num_guided_generations`, `guidance_steps`.",
        "| `guidance_steps` | `0.5` | `0.6` |",
        "| optimizer steps | 4 |",
        "| rollouts per prompt | 4, 2 of them guided |",
        "| prompts per batch | 4 |",
        "| learning rate | 0.001, linear |",
        "| rewards | `path_reward` (weight 1) |",
        "| rollouts that were guided | 50.0% | 0.0% | 25.0% |",  # in 2 of 4 steps, half of the rows
        "| `alpha` | 1 | 0 |",
        "| policy forwards per guided token | 1.00 | 1.00 | 1.00 |",  # of the stepwise sampler
        "[trainer_state.json](trainer_state.json) (all logs)",
        "- trl-selective: ",
        "Cite MENTOR as:",
        "Cite GRPO as:",
        "Cite TRL as:",
    ],
)
def test_what_a_reader_finds(folder, line):
    assert line in (folder / "README.md").read_text()


def test_every_relative_link_leads_somewhere(folder):
    links = re.findall(r"\]\((?!https://)([^)]*)\)", (folder / "README.md").read_text())
    assert "training_dynamics.png" in links
    assert all((folder / link).stat().st_size > 1000 for link in links)


def test_no_key_and_no_path(folder):
    """Those of the run, of the expert, of the evaluation; of nobody's home."""
    card = (folder / "README.md").read_text()
    assert not [place for place in (str(folder), POLICY, EXPERT, str(QUICKSTART), "/home", TOKEN) if place in card]
    assert TOKEN.encode() not in b"".join(path.read_bytes() for path in folder.iterdir() if path.is_file())


def test_an_expert_of_the_hub_is_named(tmp_path):
    trainer = make_trainer(tmp_path, expert_model_revision="v1.2")
    trainer.expert_model.config.name_or_path = "open-r1/OpenR1-Qwen-7B"  # as it is called once loaded from there
    card = card_of(trainer)
    assert (
        "The expert is [open-r1/OpenR1-Qwen-7B](https://huggingface.co/open-r1/OpenR1-Qwen-7B) at revision `v1.2`."
        in card
    )
    assert "### What guidance did" not in card  # nothing happened yet


def test_selected_completions(tmp_path):
    trainer = make_trainer(tmp_path, settings=PLAIN, preset="selective", train_dataset=expert_dataset())
    trainer.train()
    card = card_of(trainer)
    for line in [
        "This model was trained with GRPO with selected expert completions.",
        "There was no token-level guidance.",
        "up to 1 of the 4 rollouts of a prompt were replaced",
        "trigger `group_failed` | trl-selective |",
        "selector `reward_gain`, in place of the rollout with the lowest reward | trl-selective |",
        "`f(p) = p / (p + 0.1)`, `p` the policy's probability of the token | LUFFY |",
        "MENTOR is [arXiv:2510.04140](https://huggingface.co/papers/2510.04140), LUFFY is [arXiv:2504.14945]",
        "Preset `selective`. Settings",
        "| rollouts that were replaced | 25.0% |",
        "| injected completions that are correct | 100% |",
        "Cite LUFFY as:",
    ]:
        assert line in card
    assert "guided token" not in card


def test_both_kinds_together(tmp_path):
    triggers = {"injection_trigger": "zero_variance & group_failed | below", "num_guided_generations": 1}
    trainer = make_trainer(tmp_path, settings=INJECTED, train_dataset=expert_dataset(), **triggers)
    card = card_of(trainer)
    assert "trained with MENTOR with selected expert completions, a method introduced in" in card
    assert r"trigger `zero_variance & group_failed \| below`" in card
    assert "| rollouts per prompt | 4, 1 of them guided, up to 1 replaced by expert completions |" in card
    assert [card.count(f"Cite {name} as:") for name in ("LUFFY", "GRPO", "TRL")] == [1, 1, 1]
    assert card.count("@article{jiang2025selective") == 1


def test_luffy_is_called_so(tmp_path):
    trainer = make_trainer(tmp_path, settings=PLAIN, preset="luffy", train_dataset=expert_dataset())
    card = card_of(trainer)
    assert "trained with LUFFY, a method introduced in [Learning to Reason under Off-Policy Guidance]" in card
    assert "over the on-policy rollouts and injected completions of its group | LUFFY |" in card
    assert "| `alpha` | 1 throughout |" in card
    assert "2510.04140" not in card
    changed = make_trainer(
        tmp_path, settings=PLAIN, preset="luffy", injection_trigger="group_failed", train_dataset=expert_dataset()
    )
    assert "trained with GRPO with selected expert completions" in card_of(changed)


def test_without_guidance_it_is_trls_card(tmp_path):
    """With our settings and with TRL's."""
    theirs = ModelCard(card_of(make_plain_trainer(tmp_path / "theirs", GRPOTrainer)))
    for config_class in (SelectiveGuidanceGRPOConfig, GRPOConfig):
        trainer = make_plain_trainer(tmp_path / "ours", SelectiveGuidanceGRPOTrainer, config_class)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = ModelCard(card_of(trainer))
        assert ours.text == theirs.text
        assert set(ours.data.tags) == set(theirs.data.tags)


def test_without_matplotlib(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, pictures=True).train()
    told = [record.getMessage() for record in caplog.records if "No picture" in record.getMessage()]
    assert told == [
        'No picture of the training dynamics: Plots need matplotlib: pip install "trl-selective[plots]".'
    ]  # at the end
    card = (tmp_path / "README.md").read_text()
    assert "### What guidance did" in card
    assert "![Training dynamics]" not in card


def test_a_picture_that_is_being_uploaded_does_not_change(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, pictures=True)
    trainer.train()
    picture, push = tmp_path / "training_dynamics.png", Future()
    picture.write_bytes(b"on its way")
    trainer.push_in_progress = PushInProgress([push])
    assert "(training_dynamics.png)" in card_of(trainer)
    assert picture.read_bytes() == b"on its way"
    push.set_result(None)
    trainer.create_model_card(model_name="walker")
    assert picture.read_bytes() != b"on its way"


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ("{", "evaluation/results.json is no result of recipes/evaluate.py"),
        ("[]", "Evaluate again, or remove it"),
        ('{"benchmarks": {"paths": {"split": "test"}}}', "benchmark 'paths' has no dataset, num_problems"),
        (json.dumps(RESULTS).replace("0.918", "91.8"), "mean of pass@16 of 'paths' must lie in [0, 1], got 91.8"),
    ],
)
def test_no_card_is_worth_a_training_run(tmp_path, results, message):
    """Results that cannot be read are told; training, its checkpoints and the rest of the card are there."""

    class Evaluated(TrainerCallback):
        def on_step_begin(self, *event, **kwargs):
            write_results(tmp_path)
            (tmp_path / "evaluation" / "results.json").write_text(results)

    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.add_callback(Evaluated())
    with pytest.warns(UserWarning, match=re.escape(message)):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()
    card = (tmp_path / "README.md").read_text()
    assert "### What guidance did" in card
    assert "## Evaluation" not in card


def test_results_of_earlier_weights_are_not_those_of_this_model(tmp_path):
    write_results(tmp_path)
    trainer = make_trainer(tmp_path, max_steps=1)
    assert "## Evaluation" in card_of(trainer)  # nothing has changed yet
    trainer.train()
    with pytest.warns(UserWarning, match="are of the weights with which this training began"):
        assert "## Evaluation" not in card_of(trainer)
    write_results(tmp_path)
    assert "## Evaluation" in card_of(trainer)


def test_shares_of_rollouts_count_every_batch(tmp_path):
    """Half of the rows guided in 3 of 10 batches, which one line of the log sums up: the first measures the threshold, and alpha ends at 4."""
    trainer = make_trainer(tmp_path, entropy_threshold_init=None, guidance_steps=4, max_steps=10, logging_steps=10)
    trainer.train()
    assert "| rollouts that were guided | 15.0% | 15.0% | 15.0% |" in card_of(trainer)
