"""The trainer records its rollouts: `trainer.train()` with `log_completions=True`, and what the files hold then."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from tests.training import (
    GUIDED,
    INJECTED,
    PLAIN,
    POLICY,
    expert_dataset,
    length_reward,
    make_trainer,
    path_dataset,
    path_reward,
)
from trl_selective import SelectiveGuidanceGRPOTrainer
from trl_selective.reporting.rollouts import read_rollouts, recorded_steps

RECORDED = {**GUIDED, "log_completions": True, "num_completions_to_print": 0}


class Watched(SelectiveGuidanceGRPOTrainer):
    """Keeps the batches that pass, and the advantages of the loss."""

    def __init__(self, *args, **kwargs):
        self.batches, self.advantages = [], []
        super().__init__(*args, **kwargs)

    def _apply_guidance(self, output, batch):
        output = super()._apply_guidance(output, batch)
        self.batches.append(batch)
        self.advantages.append(output["advantages"].tolist())
        return output


def trained(folder, **changes):
    trainer = make_trainer(folder, **{"trainer_class": Watched, "settings": RECORDED, **changes})
    trainer.train()
    return trainer


def test_the_record_is_what_the_sampler_and_the_loss_saw(tmp_path):
    trainer = trained(tmp_path, max_steps=2, reward_funcs=[path_reward, length_reward], reward_weights=[1.0, 0.5])
    assert recorded_steps(tmp_path) == [1, 2]
    for number, (batch, advantages) in enumerate(zip(trainer.batches, trainer.advantages, strict=True)):
        rows = read_rollouts(tmp_path, [number + 1])
        assert [row["kind"] for row in rows] == (["on_policy"] * 2 + ["guided"] * 2) * 4
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in batch.rows]
        assert [row["advantage"] for row in rows] == pytest.approx(advantages)
        assert [row["reward"] for row in rows] == pytest.approx(
            [row["rewards/path_reward"] + 0.5 * row["rewards/length_reward"] for row in rows]
        )
        guided = [row for row in rows if row["kind"] == "guided"]
        for name in ("guidance_weights", "entropies", "expert_drawn"):
            recorded = [value for row in guided for value in row[name]]
            assert recorded == pytest.approx([value for row in getattr(batch.rollout, name) for value in row])
        ratios = torch.cat(batch.rollout.log_ratios())
        assert [value for row in guided for value in row["acceptance"]] == pytest.approx(
            (-ratios).exp().clamp(max=1).tolist()
        )
        for row in guided:
            assert "".join(row["tokens"]).removesuffix(" <eos>") == row["completion"]
        assert {(row["guidance_coef"], row["entropy_threshold"]) for row in rows} == {(1.0, batch.entropy_threshold)}


def test_injected_rows_say_where_they_come_from(tmp_path):
    data = expert_dataset(16)
    settings = {**RECORDED, **INJECTED, "expert_sources_column": "expert_sources", "num_guided_generations": 1}
    trainer = trained(tmp_path, settings=settings, train_dataset=data, max_steps=1)
    injected = [row for row in read_rollouts(tmp_path) if row["kind"] == "injected"]
    (batch,) = trainer.batches
    assert len(injected) == len(batch.injection.injected) > 0
    completions = {
        row["prompt"]: dict(zip(row["expert_completions"], row["expert_sources"], strict=True)) for row in data
    }
    for row in injected:
        assert completions[row["prompt"]][row["completion"]] == row["source"]
        assert (row["selector"], row["rewards/path_reward"], row["tokens"]) == ("random", 1.0, None)
        assert 0 <= row["score"] <= 1


def test_steps_without_guidance_are_recorded_as_what_they_are(tmp_path):
    trained(tmp_path, max_steps=2, guidance_steps=0.5)
    assert {row["kind"] for row in read_rollouts(tmp_path, [1])} == {"on_policy", "guided"}
    later = read_rollouts(tmp_path, [2])
    assert {(row["kind"], row["guidance_coef"], row["entropy_threshold"]) for row in later} == {
        ("on_policy", 0.0, None)
    }


def test_evaluation_is_not_recorded_and_does_not_disturb(tmp_path):
    """Evaluation after each step, logs after every second: the record is the last training batch."""
    trainer = trained(tmp_path, max_steps=3, logging_steps=2, eval_strategy="steps", eval_steps=1,
                      per_device_eval_batch_size=16, init={"eval_dataset": path_dataset(8)})  # fmt: skip
    assert recorded_steps(tmp_path) == [2]
    assert [row["prompt"] for row in read_rollouts(tmp_path)] == [row["prompt"] for row in trainer.batches[1].rows]


@pytest.mark.parametrize("changes", [{"log_completions": False}, {"settings": PLAIN, "log_completions": True}])
def test_nothing_is_recorded_that_was_not_asked_for(tmp_path, changes):
    trainer = trained(tmp_path, max_steps=1, **changes)
    assert not (tmp_path / "rollouts").exists()
    assert trainer._logged_batch is None


def test_recording_changes_no_bit(tmp_path):
    recorded, not_recorded = (
        trained(tmp_path / str(flag), log_completions=flag, max_steps=2) for flag in (True, False)
    )
    pairs = zip(recorded.model.parameters(), not_recorded.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_resumed_run_overwrites_the_steps_that_it_repeats(tmp_path):
    run = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "entropy_threshold_init": None}
    trained(tmp_path, **run)
    whole = {step: read_rollouts(tmp_path, [step]) for step in (1, 2, 3)}
    for step in (2, 3):
        (tmp_path / "rollouts" / f"rollouts_{step:05d}.parquet").write_bytes(b"of a run that was killed")
    make_trainer(tmp_path, settings=RECORDED, **run).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert {step: read_rollouts(tmp_path, [step]) for step in (1, 2, 3)} == whole


def test_conversations_are_recorded_as_the_policy_is_shown_them(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %} ~{% endif %}"
    )
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in path_dataset(8)]

    def reward(completions, **kwargs):
        return [len(completion[0]["content"]) / 60 for completion in completions]

    trained(
        tmp_path,
        max_steps=1,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        init={"processing_class": tokenizer},
    )
    recorded = read_rollouts(tmp_path)
    assert all(row["prompt"].endswith(": ~") for row in recorded)
    assert [row["rewards/reward"] for row in recorded] == pytest.approx(
        [len(row["completion"]) / 60 for row in recorded]
    )
