"""Guided training through the front door: `trainer.train()` on real models, and what follows from it."""

import copy
import json
import math
import os
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, GPT2Config, Qwen2Config

from tests.sampling.test_out_of_memory import memory_for
from tests.training import EXPERT, POLICY, QUICKSTART, filler_reward, length_reward, make_trainer, path_dataset
from trl_selective import SelectiveGuidanceGRPOConfig, SelectiveGuidanceGRPOTrainer
from trl_selective.experts import on_device
from trl_selective.functional import EntropyHistogram, guided_advantages, on_policy_advantages
from trl_selective.reporting.rollouts import read_rollouts

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


class Watched(SelectiveGuidanceGRPOTrainer):
    """Keeps what passes through the hooks."""

    def __init__(self, *args, **kwargs):
        self.batches, self.outputs, self.inputs, self.micro_batches = [], [], [], []
        super().__init__(*args, **kwargs)

    def _apply_guidance(self, output, batch):
        self.batches.append(batch)
        return super()._apply_guidance(output, batch)

    def _generate_and_score_completions(self, inputs):
        self.inputs.append(inputs)
        self.outputs.append(dict(super()._generate_and_score_completions(inputs)))
        return dict(self.outputs[-1])

    def _compute_loss(self, model, inputs):
        self.micro_batches.append(inputs)
        return super()._compute_loss(model, inputs)


def trained(folder, **changes):
    trainer = make_trainer(folder, **{"trainer_class": Watched, **changes})
    trainer.train()
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def same_parameters(first, second):
    return all(torch.equal(first.state_dict()[name], value) for name, value in second.state_dict().items())


# ---- Consequences ----------------------------------------------------------------------------------------------------------------------


def test_the_policy_learns_from_the_expert_what_it_does_not_do_by_itself(tmp_path):
    """Only the expert uses the filler word. Rewarded for it, the guided policy takes it up; alone it never finds it."""
    run = {"reward_funcs": filler_reward, "max_steps": 12, "per_device_train_batch_size": 32, "learning_rate": 3e-3}
    guided = trained(tmp_path / "guided", **run)
    alone = trained(tmp_path / "alone", **run, guidance_coef=0.0)
    assert sum(logged(alone, "reward")[-3:]) == 0
    assert sum(logged(guided, "reward")[-3:]) / 3 > 0.3
    assert logged(guided, "guidance/rescued_groups")[0] > 0.5


def test_the_threshold_is_the_quantile_of_the_on_policy_entropies_one_batch_late(tmp_path):
    trainer = trained(tmp_path, entropy_threshold_init=None, entropy_quantile=0.8, learning_rate=0.0, logging_steps=1)
    assert (
        "guidance/entropy_threshold" not in trainer.state.log_history[0]
    )  # nothing was measured before the first batch
    assert len(trainer.batches) == 2
    first = trainer.outputs[0]  # all on-policy
    assert "is_guided" not in first
    ids = torch.cat([first["prompt_ids"], first["completion_ids"]], dim=1)
    mask = torch.cat([first["prompt_mask"], first["completion_mask"]], dim=1)
    logits = AutoModelForCausalLM.from_pretrained(POLICY)(input_ids=ids, attention_mask=mask).logits
    probs = logits[:, first["prompt_ids"].size(1) - 1 : -1].double().softmax(-1)
    entropies = torch.special.entr(probs).sum(-1)[first["completion_mask"].bool()]
    width = EntropyHistogram(trainer.model.config.vocab_size).bin_width
    assert logged(trainer, "guidance/entropy_threshold")[0] == pytest.approx(
        entropies.quantile(0.8, interpolation="nearest").item(), abs=2 * width
    )


def test_guided_rows_do_not_move_the_threshold(tmp_path):
    """With one step a batch, the second threshold comes from the on-policy rows of the first batch alone."""
    trainer = trained(tmp_path, learning_rate=0.0, max_steps=2, guidance_weighting="entropy")
    first = trainer.outputs[0]
    rows = ~first["is_guided"]
    ids = torch.cat([first["prompt_ids"], first["completion_ids"]], dim=1)
    mask = torch.cat([first["prompt_mask"], first["completion_mask"]], dim=1)
    logits = trainer.model(input_ids=ids[rows], attention_mask=mask[rows]).logits
    probs = logits[:, first["prompt_ids"].size(1) - 1 : -1].double().softmax(-1)
    entropies = torch.special.entr(probs).sum(-1)[first["completion_mask"][rows].bool()]
    width = EntropyHistogram(trainer.model.config.vocab_size).bin_width
    assert logged(trainer, "guidance/entropy_threshold")[1] == pytest.approx(
        entropies.quantile(0.95, interpolation="nearest").item(), abs=2 * width
    )
    assert logged(trainer, "entropy")[0] == pytest.approx(
        entropies.mean().item(), rel=1e-4
    )  # TRL's metric means the policy


def test_alpha_ends_guidance(tmp_path):
    """Two guided steps, then plain GRPO: the expert is not called, and no row is guided."""
    trainer = trained(tmp_path, max_steps=4, guidance_steps=2)
    assert logged(trainer, "guidance/coef") == [1.0, 1.0, 0.0, 0.0]
    assert len(trainer.batches) == 2
    assert ["is_guided" in output for output in trainer.outputs] == [True, True, False, False]
    assert len(logged(trainer, "guidance/weight")) == 2


def test_evaluation_is_never_guided(tmp_path):
    trainer = make_trainer(
        tmp_path, trainer_class=Watched, max_steps=2, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=16,
        init={"eval_dataset": path_dataset(8)}, log_completions=True,
    )  # fmt: skip
    trainer.train()
    assert len(trainer.batches) == 2  # two training batches, and none of the four of evaluation
    assert len(trainer.outputs) > 2
    evaluations = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert evaluations
    assert not [name for entry in evaluations for name in entry if name.startswith("eval_guidance")]


# ---- Whose rows, which advantages ------------------------------------------------------------------------------------------------------


def test_the_last_rows_of_each_group_are_guided_and_weighed_by_equations_10_and_11(tmp_path):
    trainer = trained(tmp_path, reward_funcs=length_reward, guidance_coef=0.5, reward_range=2.0, max_steps=1)
    (output,), (batch,) = trainer.outputs, trainer.batches
    assert output["is_guided"].tolist() == [False, False, True, True] * 4
    decoded = trainer.processing_class.batch_decode(
        output["completion_ids"] * output["completion_mask"], skip_special_tokens=True
    )
    rewards = torch.tensor(length_reward(decoded)).view(4, 4)
    expected = torch.cat(
        [on_policy_advantages(rewards[:, :2]), guided_advantages(rewards[:, 2:], rewards[:, :2], 0.5, 2.0)], dim=1
    )
    torch.testing.assert_close(output["advantages"].view(4, 4), expected, rtol=1e-5, atol=1e-6)
    guided = output["completion_ids"][output["is_guided"]].tolist()
    for row, ids in zip(guided, batch.rollout.completion_ids, strict=True):
        assert row[: len(ids)] == ids


@pytest.mark.parametrize("max_ratio", [1.2, 0.9])
@pytest.mark.parametrize("correction", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_correction_multiplies_guided_tokens_by_pi_theta_over_pi_mix(tmp_path, correction, max_ratio):
    trainer = trained(tmp_path, guided_importance_correction=correction, importance_ratio_max=max_ratio, max_steps=1,
                      reward_funcs=length_reward)  # fmt: skip
    (output,), (batch,) = trainer.outputs, trainer.batches
    level, _, bound = correction.partition("_")
    advantages, is_guided, seq = output["advantages"], output["is_guided"], output["completion_ids"].size(1)
    assert advantages.shape == (16, 1 if level == "sequence" else seq)
    rewards = batch.rewards_per_func[:, 0].view(4, 4)
    on_policy = on_policy_advantages(rewards[:, :2]).view(-1, 1)
    torch.testing.assert_close(advantages[~is_guided], on_policy.expand(-1, advantages.size(1)))  # their weight is 1
    unweighted = guided_advantages(rewards[:, 2:], rewards[:, :2], 1.0, 1.0).flatten()
    assert unweighted.max() > 0
    guided = advantages.expand(16, seq)[is_guided]
    logps = batch.rollout.policy_per_token_logps, batch.rollout.sampling_per_token_logps
    for row, advantage, policy, mixed in zip(guided, unweighted, *logps, strict=True):
        log_ratio = torch.tensor(policy) - torch.tensor(mixed)
        ratio = log_ratio.exp() if level == "token" else log_ratio.sum().exp().expand(len(policy))
        weight = ratio.clamp(max=max_ratio) if bound == "truncate" else torch.where(ratio <= max_ratio, ratio, 0.0)
        torch.testing.assert_close(row[: len(policy)], advantage * weight, rtol=1e-4, atol=1e-6)


def test_the_record_agrees_with_the_forward_of_the_loss(tmp_path):
    """log pi_theta and H as TRL computes them, at the temperature of training."""
    trainer = trained(tmp_path, temperature=0.7, learning_rate=0.0, max_steps=1)
    (output,), (batch,) = trainer.outputs, trainer.batches
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    with torch.no_grad():
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, output["completion_ids"].size(1), compute_entropy=True
        )
    selected = output["completion_mask"].bool() & output["is_guided"].unsqueeze(1)
    for record, values in (("policy_per_token_logps", logps), ("entropies", entropies)):
        recorded = torch.cat([torch.tensor(row) for row in getattr(batch.rollout, record)])
        torch.testing.assert_close(recorded, values[selected], rtol=0, atol=2e-4)


def test_a_capped_weight_bounds_the_ratio(tmp_path):
    """w <= 0.9, so pi_theta / pi_mix <= 1 / (1 - 0.9)."""
    trainer = trained(tmp_path, preset="mentor_corrected", num_guided_generations=2, per_device_train_batch_size=64)
    largest = max(torch.cat(batch.rollout.log_ratios()).max().exp() for batch in trainer.batches)
    assert 5 < largest <= 10 * (1 + 1e-4)


def test_flags_stay_with_their_rows_through_shuffling_and_splitting(tmp_path):
    trainer = trained(
        tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=4, num_iterations=2, max_steps=2
    )
    guided = {tuple(ids) for batch in trainer.batches for ids in batch.rollout.completion_ids}
    flags = 0
    for inputs in trainer.micro_batches:
        for ids, mask, is_guided in zip(
            inputs["completion_ids"], inputs["completion_mask"], inputs["is_guided"], strict=True
        ):
            if is_guided:
                assert tuple(ids[mask.bool()].tolist()) in guided
            flags += int(is_guided)
    assert flags == sum(inputs["is_guided"].numel() for inputs in trainer.micro_batches) // 2


# ---- Reductions ------------------------------------------------------------------------------------------------------------------------


def test_an_expert_equal_to_the_policy_changes_no_draw(tmp_path):
    """pi_mix = pi_theta whatever w: ratios of 1, nothing drawn by the expert."""
    trainer = trained(
        tmp_path, expert_model=POLICY, max_steps=1, guidance_weighting="constant", guidance_weight_max=0.5
    )
    rollout = trainer.batches[0].rollout
    assert not any(map(any, rollout.expert_drawn))
    assert torch.cat(rollout.log_ratios()).abs().max() < 1e-6
    assert logged(trainer, "guidance/importance_ratio/mean") == pytest.approx([1.0], abs=1e-6)
    assert logged(trainer, "guidance/importance_ratio/ess") == pytest.approx([1.0], abs=1e-6)


@pytest.mark.parametrize("correction", ["token_truncate", "sequence_mask"])
def test_with_w_0_a_correction_changes_nothing(tmp_path, correction):
    """pi_mix = pi_theta, so every weight is 1: the same parameters as without a correction."""
    run = {"guidance_weight_max": 0.0, "reward_funcs": length_reward}
    without = trained(tmp_path / "without", **run)
    corrected = trained(tmp_path / "with", **run, guided_importance_correction=correction)
    for name, value in without.model.state_dict().items():
        torch.testing.assert_close(corrected.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_with_w_1_the_expert_answers(tmp_path):
    """pi_mix = pi*: guided rows succeed as often as the expert, nine times in ten."""
    trainer = trained(tmp_path, guidance_weighting="constant", max_steps=1, per_device_train_batch_size=128)
    assert logged(trainer, "guidance/weight") == [1.0]
    assert logged(trainer, "guidance/reward/guided")[0] > 0.75
    assert logged(trainer, "guidance/reward/on_policy")[0] < 0.1


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("correction", ["none", "token_truncate"])
def test_every_loss_of_trl_trains_on_guided_rows(tmp_path, loss_type, correction):
    trainer = trained(tmp_path, loss_type=loss_type, guided_importance_correction=correction, max_steps=2,
                      reward_funcs=length_reward)  # fmt: skip
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))
    assert not same_parameters(trainer.model, AutoModelForCausalLM.from_pretrained(POLICY))


# ---- Metrics ---------------------------------------------------------------------------------------------------------------------------


def test_trls_metrics_mean_the_policy(tmp_path):
    """Recomputed from the completions: TRL's names over on-policy rows, ours over guided ones."""
    trainer = trained(tmp_path, reward_funcs=[length_reward, filler_reward], reward_weights=[1.0, 0.5], max_steps=1,
                      per_device_train_batch_size=32)  # fmt: skip
    (output,), (batch,) = trainer.outputs, trainer.batches
    entry = trainer.state.log_history[0]
    total = batch.rewards_per_func @ torch.tensor([1.0, 0.5])
    own, guided = total[~output["is_guided"]], total[output["is_guided"]]
    lengths = output["completion_mask"].sum(1)
    expected = {
        "reward": own.mean(),
        "reward_std": own.std(),
        "rewards/length_reward/mean": batch.rewards_per_func[~output["is_guided"], 0].mean(),
        "rewards/filler_reward/mean": batch.rewards_per_func[~output["is_guided"], 1].mean(),
        "frac_reward_zero_std": (own.view(8, 2).std(1) == 0).float().mean(),
        "completions/mean_length": lengths[~output["is_guided"]].float().mean(),
        "completions/max_length": lengths[~output["is_guided"]].max(),
        "guidance/reward/on_policy": own.mean(),
        "guidance/reward/guided": guided.mean(),
        "guidance/completions/mean_length": lengths[output["is_guided"]].float().mean(),
        # correct means more than half of the range, 1 + 0.5
        "guidance/rescued_groups": ((guided.view(8, 2) > 0.75).any(1) & ~(own.view(8, 2) > 0.75).any(1))
        .float()
        .mean(),
        "guidance/weight": torch.cat([torch.tensor(w) for w in batch.rollout.guidance_weights]).mean(),
        "guidance/coef": torch.tensor(1.0),
        "guidance/policy_forwards_per_token": torch.tensor(1.0),  # stepwise
        "guidance/expert_forwards_per_token": torch.tensor(1.0),
    }
    assert {name: entry[name] for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-4
    )
    assert 0 < entry["guidance/expert_drawn"] < entry["guidance/weight"]
    assert entry["guidance/importance_ratio/p99"] > 1


@pytest.mark.parametrize(("scale_rewards", "expected"), [("group", 1.0), ("batch", 0.0)])
def test_groups_without_variance_are_counted_as_trl_counts_them(tmp_path, scale_rewards, expected):
    """Rewards that differ between prompts only. The last step is TRL's own."""

    def by_prompt(completions, start, **kwargs):
        return [s / 36 for s in start]

    trainer = trained(tmp_path, reward_funcs=by_prompt, scale_rewards=scale_rewards, guidance_steps=2)
    assert logged(trainer, "frac_reward_zero_std") == [expected] * 3


def by_task(share):
    """The filler reward for the problems whose start has this remainder; no opinion about the others."""

    def reward(completions, start, **kwargs):
        return [float("~" in text) if s % 2 == share else None for text, s in zip(completions, start, strict=True)]

    reward.__name__ = f"filler_{share}"
    return reward


def test_a_reward_function_per_task_counts_as_one_for_all(tmp_path):
    """TRL's way with several tasks: a function returns None for rows that are not its own."""
    single = trained(tmp_path / "one", reward_funcs=filler_reward)
    several = trained(tmp_path / "two", reward_funcs=[by_task(0), by_task(1)])
    for ours, theirs in zip(several.outputs, single.outputs, strict=True):
        assert torch.equal(ours["advantages"], theirs["advantages"])
    assert sum(logged(single, "guidance/rescued_groups")) > 0
    assert logged(several, "guidance/rescued_groups") == logged(single, "guidance/rescued_groups")


def test_what_the_rollout_cannot_know_is_not_logged(tmp_path):
    """With the initial policy in the mixture, nobody has the trained policy's probabilities."""
    trainer = trained(tmp_path, mixture_policy="initial", max_steps=1)
    assert logged(trainer, "guidance/weight")
    assert not [name for entry in trainer.state.log_history for name in entry if "importance_ratio" in name]


def test_guidance_that_cannot_start_is_named(tmp_path):
    """Three tokens are not enough for an answer to end, and what does not end is masked."""
    changes = {"mask_truncated_completions": True, "max_completion_length": 3, "entropy_threshold_init": None}
    with pytest.warns(
        UserWarning, match="Guidance cannot start: no on-policy token was left .*Set entropy_threshold_init"
    ):
        trained(tmp_path, **changes, max_steps=2)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_steps": 4, "guidance_steps": 0.5}, None),
        ({"max_steps": 2, "guidance_steps": 0.5}, "until step 1, and alpha is 0 by step 1"),
        ({"max_steps": 2, "guidance_steps": 1.0}, None),
        ({"max_steps": 1, "guidance_steps": 10}, "until step 1, and training ends at step 1"),
        ({"max_steps": 4, "guidance_steps": 0.5, "num_iterations": 2}, "until step 2, and alpha is 0 by step 2"),
        ({"max_steps": 4, "guidance_steps": 0.75, "num_iterations": 2}, None),
        (
            {"max_steps": 4, "guidance_steps": 3, "steps_per_generation": 4},
            "until step 4, and training ends at step 4",
        ),
        ({"max_steps": 4, "guidance_steps": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 4}, None),
        ({"max_steps": 1, "guidance_steps": 1.0, "entropy_threshold_init": 1.0}, None),
        ({"max_steps": 1, "guidance_steps": 1.0, "guidance_weighting": "constant"}, None),
    ],
)
def test_a_run_that_is_never_guided_is_named(tmp_path, settings, says):
    """Before anything is sampled, and no other."""
    settings = {"entropy_threshold_init": None, "guidance_schedule": "cosine", **settings}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trained(tmp_path, reward_funcs=length_reward, **settings)
    said = [str(warning.message) for warning in caught if "No rollout will be guided" in str(warning.message)]
    assert len(said) == (says is not None)
    assert all(says in text for text in said)
    assert bool(logged(trainer, "guidance/expert_drawn")) == (says is None)


def test_the_completions_table_says_who_was_guided(tmp_path):
    trainer = trained(tmp_path, max_steps=2, log_completions=True, guidance_steps=0.5)
    columns = trainer._logs["extra"]
    assert len(columns["guided"]) == len(trainer._logs["completion"]) == len(trainer._logs["advantages"])
    assert not any(columns["guided"])  # the last batch is plain GRPO


def test_advantages_of_the_completions_table_are_those_of_the_loss(tmp_path):
    trainer = trained(tmp_path, max_steps=1, log_completions=True, reward_funcs=length_reward)
    assert list(trainer._logs["advantages"]) == pytest.approx(trainer.outputs[0]["advantages"].tolist())
    assert list(trainer._logs["extra"]["guided"]) == trainer.outputs[0]["is_guided"].tolist()


# ---- Models and modes ------------------------------------------------------------------------------------------------------------------


def test_the_speculative_sampler_in_the_trainer(tmp_path):
    trainer = trained(tmp_path, guided_sampler="speculative", draft_length=3)
    assert all(0 < value <= 1 for value in logged(trainer, "guidance/acceptance_rate"))
    assert all(1 <= value <= 3 for value in logged(trainer, "guidance/draft_length"))


def test_a_chosen_draft_length_reaches_training(tmp_path):
    trainer = trained(tmp_path, guided_sampler="auto", max_draft_length=5)
    assert all(1 <= value <= 5 for value in logged(trainer, "guidance/draft_length"))


def test_an_offloaded_expert_guides_as_any_other(tmp_path, monkeypatch):
    moves = []
    monkeypatch.setattr("trl_selective.trainer.on_device", lambda *args: moves.append(args[1]) or on_device(*args))
    offloaded = trained(tmp_path / "offloaded", expert_model_offload=True)
    assert moves == [offloaded.accelerator.device] * 3  # once a rollout
    assert same_parameters(offloaded.model, trained(tmp_path / "there").model)
    assert len(moves) == 3


@pytest.mark.parametrize(("mixture_policy", "num_calls"), [("current", 1), ("initial", 3)])
def test_on_policy_rows_are_drawn_in_the_loop_of_guided_ones(tmp_path, monkeypatch, mixture_policy, num_calls):
    """Where both are drawn from one policy. The first batch, which measures the threshold, is TRL's own."""
    batches = []
    generate = GenerationMixin.generate

    def note(self, *args, **kwargs):
        batches.append(len(kwargs["input_ids"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", note)
    trainer = trained(tmp_path, mixture_policy=mixture_policy, entropy_threshold_init=None, reward_funcs=length_reward)
    assert batches == [16, 8, 8][:num_calls]
    assert [batch.num_rows for batch in trainer.batches] == [16, 16]
    for batch, output in zip(trainer.batches, trainer.outputs[1:], strict=True):
        assert len(batch.rollout.completion_ids) == 8
        rows = zip(output["completion_ids"], output["completion_mask"], strict=True)
        assert [ids[mask.bool()].tolist() for ids, mask in rows] == batch.completion_ids
        assert batch.split(batch.completion_ids)[1] == batch.rollout.completion_ids


def test_the_coin_sampler_in_the_trainer(tmp_path):
    trainer = trained(tmp_path, guided_sampler="coin")
    assert all(0 < value < 1 for value in logged(trainer, "guidance/expert_forwards_per_token"))
    assert logged(trainer, "guidance/policy_forwards_per_token") == [1.0] * 3


@pytest.mark.parametrize("sampler", ["stepwise", "coin", "speculative"])
def test_mixed_precision_and_gradient_checkpointing(tmp_path, sampler):
    """As TRL trains by default. The record agrees with the loss's own log-probs to what bfloat16 resolves."""
    trainer = trained(tmp_path, bf16=True, gradient_checkpointing=True, guided_sampler=sampler, max_steps=2)
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))
    assert trainer.model.is_gradient_checkpointing
    assert trainer.model.training


def test_an_adapter_is_trained_and_its_base_is_not(tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = make_trainer(tmp_path, trainer_class=Watched, init={"peft_config": adapter}, reward_funcs=length_reward)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora" in name for name in changed)
    assert len(trainer.batches) == 3


def test_conversations_with_token_type_ids(tmp_path):
    """Some tokenizers give every prompt a second row, which must follow the prompts that stay on-policy."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    rows = path_dataset(16).map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    config = GPT2Config(
        vocab_size=45, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1, pad_token_id=0
    )
    trainer = trained(
        tmp_path, model=AutoModelForCausalLM.from_config(config), train_dataset=rows, max_steps=1,
        reward_funcs=lambda completions, **kwargs: [1.0] * len(completions), init={"processing_class": tokenizer},
    )  # fmt: skip
    assert len(trainer.batches[0].rollout.completion_ids) == 8


def test_the_initial_policy_stays_in_the_mixture(tmp_path):
    """`mentor_as_released`: what is mixed is the starting checkpoint, however far training has moved."""
    trainer = make_trainer(tmp_path, trainer_class=Watched, preset="mentor_as_released", learning_rate=1e-2, max_steps=3,
                           reward_funcs=length_reward, entropy_threshold_init=None, num_guided_generations=2,
                           guidance_schedule="constant")  # fmt: skip
    trainer.train()
    assert trainer._sampler.policy is not trainer.model
    assert same_parameters(trainer._sampler.policy, AutoModelForCausalLM.from_pretrained(POLICY))
    assert not same_parameters(trainer.model, trainer._sampler.policy)
    ids = torch.tensor([[3, 9, 20]])
    fresh = AutoModelForCausalLM.from_pretrained(POLICY)
    torch.testing.assert_close(trainer._sampler.policy(ids).logits, fresh(ids).logits)
    for batch in trainer.batches:
        assert all(row[0] == 1.0 for row in batch.rollout.guidance_weights)  # the first token is the expert's


def test_the_initial_policy_has_the_head_of_the_trained_one(tmp_path):
    """TRL's cast of the head to float32 goes with the copy: at the start the two have the same logits."""
    options = {"cast_lm_head_to_fp32": True, "model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = trained(tmp_path, mixture_policy="initial", learning_rate=0.0, max_steps=1, **options)
    assert trainer._sampler.policy.lm_head.weight.dtype == torch.float32
    assert trainer._sampler.policy.lm_head is not trainer.model.lm_head
    ids = torch.tensor([[3, 9, 20]])
    torch.testing.assert_close(trainer._sampler.policy(ids).logits, trainer.model(ids).logits, rtol=0, atol=0)


def test_a_preset_is_printed_in_full(tmp_path, capsys):
    make_trainer(tmp_path, preset="mentor_corrected", num_generations=8, draft_length=4, guided_sampler="speculative")
    printed = capsys.readouterr().out
    assert "preset 'mentor_corrected'" in printed
    assert "guidance_weight_max=0.9" in printed
    assert "guided_importance_correction='token_truncate'" in printed
    assert "draft_length=4" in printed
    assert not any(idle in printed for idle in ("max_draft_length", "injection_", "server", "None"))


@pytest.mark.parametrize(
    ("preset", "ours", "said"),
    [
        ("mentor", {"num_generations": 8}, "Its paper has num_generations=12, here it is 8."),
        ("mentor", {"num_generations": 12, "per_device_train_batch_size": 12}, ""),
        ("luffy", {"scale_rewards": "none"}, "Its paper has loss_type='dr_grpo', here it is 'dapo'."),
        ("selective", {}, ""),
    ],
)
def test_what_a_preset_leaves_to_trl_is_said(preset, ours, said):
    args = SelectiveGuidanceGRPOConfig("out", preset=preset, bf16=False, **{"per_device_train_batch_size": 8, **ours})
    words, _, beside = args.preset_in_words().partition(". ")
    assert words.startswith(f"preset '{preset}': num_")
    assert beside == said


def test_the_expert_is_frozen_and_no_part_of_the_policy(tmp_path):
    trainer = trained(tmp_path, reward_funcs=length_reward)
    assert not trainer.expert_model.training
    assert not any(parameter.requires_grad for parameter in trainer.expert_model.parameters())
    assert same_parameters(trainer.expert_model, AutoModelForCausalLM.from_pretrained(EXPERT))
    assert all(module is not trainer.expert_model for module in trainer.model.modules())
    optimised = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert not optimised & {id(parameter) for parameter in trainer.expert_model.parameters()}


def test_an_expert_given_as_a_model(tmp_path):
    expert = AutoModelForCausalLM.from_pretrained(EXPERT)
    trainer = trained(tmp_path, expert_model=expert, max_steps=1)
    assert trainer.expert_model is expert
    assert len(trainer.batches) == 1


def test_without_args_our_config_is_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    on_cpu = partial(SelectiveGuidanceGRPOConfig, use_cpu=True)  # TRL's defaults ask for bfloat16, on a CPU only so
    monkeypatch.setattr("trl_selective.trainer.SelectiveGuidanceGRPOConfig", on_cpu)
    trainer = SelectiveGuidanceGRPOTrainer(POLICY, length_reward, train_dataset=path_dataset(8))
    assert isinstance(trainer.args, SelectiveGuidanceGRPOConfig)
    assert trainer.args.output_dir == "policy-GRPO"
    assert trainer.num_guided_generations == 0


def test_the_model_card_names_the_method(tmp_path):
    trainer = trained(tmp_path, max_steps=1)
    trainer.create_model_card(model_name="guided")
    card = (tmp_path / "README.md").read_text()
    assert "2510.04140" in card
    assert "selective-guidance" in card


# ---- Errors before training ------------------------------------------------------------------------------------------------------------


def test_models_with_images_are_refused(tmp_path):
    """What TRL would say of such a model is set by hand."""
    trainer = make_trainer(tmp_path)
    trainer._is_vlm = True
    with pytest.raises(ValueError, match="needs a text model, got a processor with images"):
        trainer._check_run()


def test_a_fused_loss_is_refused(tmp_path):
    """As TRL < 1.15 has it with Liger."""
    trainer = make_trainer(tmp_path)
    trainer.use_liger_kernel = True
    with pytest.raises(
        ValueError, match=r"use_liger_kernel=True fuses the loss.*Set it to False, or update TRL to 1\.16"
    ):
        trainer._check_run()


def test_a_cache_that_cannot_take_tokens_back_will_do_for_single_steps(tmp_path):
    config = Qwen2Config(vocab_size=45, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, use_sliding_window=True, sliding_window=8, max_window_layers=0,
                         eos_token_id=1, pad_token_id=0)  # fmt: skip
    expert = AutoModelForCausalLM.from_config(config)
    init = {"expert_processing_class": AutoTokenizer.from_pretrained(EXPERT)}
    assert len(trained(tmp_path, expert_model=expert, init=init, max_steps=1).batches) == 1  # stepwise takes it


def test_a_distribution_that_is_not_finite_stops_training(tmp_path):
    expert = AutoModelForCausalLM.from_pretrained(EXPERT)
    torch.nn.init.constant_(expert.lm_head.weight, torch.nan)
    trainer = make_trainer(tmp_path, expert_model=expert)
    with pytest.raises(ValueError, match="distribution that is not finite"):
        trainer.train()
    assert trainer._batch is None


# ---- Processes -------------------------------------------------------------------------------------------------------------------------

TWO_PROCESSES = """
import json, sys
from tests.processes import leave
from tests.test_trainer import Watched, expected_advantages
from tests.training import length_reward, make_trainer
trainer = make_trainer(sys.argv[1], trainer_class=Watched, max_steps=3, per_device_train_batch_size=8, entropy_threshold_init=None,
                       reward_funcs=length_reward, log_completions=True)
trainer.train()
record = {
    "threshold": trainer._threshold.value,
    "sum": trainer.accelerator.unwrap_model(trainer.model).lm_head.weight.double().sum().item(),
    "advantages": trainer.outputs[-1]["advantages"].tolist(),
    "expected": expected_advantages(trainer, trainer.outputs[-1]).tolist(),
    "reward": trainer.state.log_history[-2]["reward"],
    "own_rewards": trainer.batches[-1].rewards_per_func[:, 0].tolist(),
    "logged": list(trainer._logs["advantages"]),
}
with open(f"{sys.argv[1]}/rank{trainer.accelerator.process_index}.json", "w") as file:
    json.dump(record, file)
leave()
"""


def expected_advantages(trainer, output):
    """Eq. 10-11 from the completions of this process alone, for groups of 2 + 2, alpha = 1 and a range of 1."""
    ids = output["completion_ids"] * output["completion_mask"]
    rewards = torch.tensor(length_reward(trainer.processing_class.batch_decode(ids, skip_special_tokens=True))).view(
        -1, 4
    )
    own, guided = rewards.split(2, dim=1)
    return torch.cat([on_policy_advantages(own), guided_advantages(guided, own, 1.0, 1.0)], dim=1).flatten()


def test_two_processes_agree_on_threshold_and_parameters(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
        str(tmp_path),
    ]
    root = str(QUICKSTART.parents[1])
    result = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["threshold"] == second["threshold"] > 0
    assert first["sum"] == second["sum"]
    for record in (first, second):
        assert record["advantages"] == pytest.approx(record["expected"], abs=1e-5)
    assert first["advantages"] != second["advantages"]
    rewards = torch.tensor(first["own_rewards"]).view(-1, 4)[:, :2]  # of all processes
    assert rewards.numel() == 8
    assert first["reward"] == second["reward"] == pytest.approx(rewards.mean().item())
    assert first["logged"] == pytest.approx(first["advantages"] + second["advantages"])
    rows = read_rollouts(tmp_path, [3])
    assert [(row["group"], row["row"]) for row in rows] == [(group, row) for group in range(4) for row in range(4)]
    assert [row["advantage"] for row in rows] == pytest.approx(first["logged"])
    guided = [row for row in rows if row["kind"] == "guided"]
    assert len(guided) == 8
    assert all("".join(row["tokens"]).removesuffix(" <eos>") == row["completion"] for row in guided)


def test_a_run_goes_on_where_memory_runs_out_for_its_rollouts(tmp_path):
    whole = trained(tmp_path / "whole")
    expert = AutoModelForCausalLM.from_pretrained(EXPERT)
    init = {"expert_processing_class": AutoTokenizer.from_pretrained(EXPERT)}
    with memory_for(160, expert) as asked, pytest.warns(UserWarning, match="half of them wait"):
        halved = trained(tmp_path / "halved", expert_model=expert, init=init)
    assert sum(cells > 160 for cells in asked) >= 3  # in each step
    for ours, theirs in zip(halved.outputs, whole.outputs, strict=True):
        assert torch.equal(ours["completion_ids"], theirs["completion_ids"])
    losses = (logged(trainer, "loss") for trainer in (halved, whole))
    assert next(losses) == pytest.approx(next(losses), abs=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_guided_training_on_an_accelerator(tmp_path, monkeypatch, bf16):
    """On-policy and guided rows are drawn by CUDA graphs, also where the policy computes in another precision than its weights have."""
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    trainer = make_trainer(tmp_path, use_cpu=False, bf16=bf16, max_steps=4, reward_funcs=length_reward)
    trainer.train()
    assert trainer.accelerator.device.type == "cuda"
    assert len(set(replays)) >= 2 * 4  # of both models, in each step
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
    drawn = logged(trainer, "guidance/expert_drawn")
    assert all(0 < share < 1 for share in drawn)


# ---- Vocabularies ----------------------------------------------------------------------------------------------------------------------


def with_tokens(folder, **tokens):
    """The quickstart's policy with more tokens, saved."""
    tokenizer, model = AutoTokenizer.from_pretrained(POLICY), AutoModelForCausalLM.from_pretrained(POLICY)
    tokenizer.add_special_tokens(tokens)
    model.resize_token_embeddings(len(tokenizer))
    for part in (tokenizer, model):
        part.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("guided_sampler", ["speculative", "coin", "stepwise"])
def test_a_pad_token_that_the_expert_lacks_only_pads(tmp_path, guided_sampler):
    model = with_tokens(tmp_path / "policy", pad_token="<new_pad>")
    prompts = ["2 7 > 21 :", "2 7 8 13 > 21 :"]  # one of which is padded
    rows = Dataset.from_list([{**path_dataset(1)[0], "prompt": prompt} for prompt in prompts * 4])
    trainer = trained(tmp_path / "out", model=model, train_dataset=rows, guided_sampler=guided_sampler, max_steps=2)
    assert logged(trainer, "guidance/weight")


def test_a_token_that_the_expert_lacks_is_drawn_as_without_guidance(tmp_path):
    """The policy says it as often as "R"; the expert, whose head is padded, never does."""
    model = with_tokens(tmp_path / "policy", extra_special_tokens=["<think>"])
    policy, expert = AutoModelForCausalLM.from_pretrained(model), AutoModelForCausalLM.from_pretrained(EXPERT)
    expert.resize_token_embeddings(policy.config.vocab_size)
    right = AutoTokenizer.from_pretrained(EXPERT).convert_tokens_to_ids("R")
    with torch.no_grad():
        for each in (policy, expert):
            each.lm_head.weight[-1] = each.lm_head.weight[right]
    settings = {"model": policy, "expert_model": expert, "max_steps": 1}
    tokenizers = {
        "processing_class": AutoTokenizer.from_pretrained(model),
        "expert_processing_class": AutoTokenizer.from_pretrained(EXPERT),
    }
    with pytest.warns(UserWarning, match=r"has no token '<think>' \(id 45\)"):
        trainer = make_trainer(tmp_path / "out", **settings, init=tokenizers, trainer_class=Watched)
    trainer.train()
    (batch,) = trainer.batches
    think = policy.config.vocab_size - 1
    assert (trainer._sampler.vocab_size, trainer._sampler.policy_vocab_size) == (think, think + 1)
    own = [ids for ids, is_guided in zip(batch.completion_ids, batch.is_guided, strict=True) if not is_guided]
    assert any(think in ids for ids in own)
    drawn = zip(batch.rollout.completion_ids, batch.rollout.expert_drawn, strict=True)
    assert not any(flag for ids, flags in drawn for token, flag in zip(ids, flags, strict=True) if token == think)


# ---- The record of rewards -------------------------------------------------------------------------------------------------------------


def test_functions_of_one_name_have_the_totals_that_training_has(tmp_path):
    """Of which TRL's log keeps one by name: 2 x length, and -1 for the other."""

    def reward_of(values):
        def reward(completions, **columns):
            return values(completions)

        return reward

    funcs = [reward_of(length_reward), reward_of(lambda completions: [0.0, 1.0] * (len(completions) // 2))]
    trainer = trained(tmp_path, reward_funcs=funcs, reward_weights=[2.0, 0.25], log_completions=True, max_steps=1)
    (rows,) = [group for group in [read_rollouts(tmp_path)] if group]
    (output,) = trainer.outputs
    assert len(rows) == len(output["advantages"])
    expected = [2 * length_reward([row["completion"]])[0] + 0.25 * (number % 2) for number, row in enumerate(rows)]
    assert [row["reward"] for row in rows] == pytest.approx(expected, rel=1e-5)
