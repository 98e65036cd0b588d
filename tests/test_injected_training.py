"""Injected expert completions through the front door: `trainer.train()` on real models, and what follows from it."""

import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tests.training import (
    EXPERT,
    GUIDED,
    INJECTED,
    PLAIN,
    POLICY,
    QUICKSTART,
    expert_dataset,
    length_reward,
    make_trainer,
    path_reward,
)
from trl_selective import SelectiveGuidanceGRPOConfig, SelectiveGuidanceGRPOTrainer
from trl_selective.experts import completion_logps
from trl_selective.functional import injected_importance_weight, mixed_group_advantages
from trl_selective.selection import Always, Selector, WithProbability
from trl_selective.state import STATE_FILE

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


class Watched(SelectiveGuidanceGRPOTrainer):
    """Keeps what passes through the hooks."""

    def __init__(self, *args, **kwargs):
        self.batches, self.outputs, self.micro_batches = [], [], []
        super().__init__(*args, **kwargs)

    def _apply_guidance(self, output, batch):
        self.batches.append(batch)
        return super()._apply_guidance(output, batch)

    def _generate_and_score_completions(self, inputs):
        self.outputs.append(dict(super()._generate_and_score_completions(inputs)))
        return dict(self.outputs[-1])

    def _compute_loss(self, model, inputs):
        self.micro_batches.append(inputs)
        return super()._compute_loss(model, inputs)


class WatchedGRPO(GRPOTrainer):
    """TRL's trainer, with what it generated."""

    def _generate_and_score_completions(self, inputs):
        self.outputs = [*getattr(self, "outputs", []), super()._generate_and_score_completions(inputs)]
        return self.outputs[-1]


def build(folder, **changes):
    options = {"trainer_class": Watched, "settings": INJECTED, "train_dataset": expert_dataset(16), **changes}
    return make_trainer(folder, **options)


def trained(folder, **changes):
    trainer = build(folder, **changes)
    trainer.train()
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if entry.get(name) is not None]


def texts(trainer, output, rows=slice(None)):
    ids = output["completion_ids"] * output["completion_mask"]
    return trainer.processing_class.batch_decode(ids[rows], skip_special_tokens=True)


def with_completions(completions, num_problems=16, **columns) -> Dataset:
    """The problems with these completions for each, or with what a function of the row gives."""
    give = completions if callable(completions) else lambda row: completions
    rows = expert_dataset(num_problems).remove_columns(["expert_completions", "expert_sources"])
    return Dataset.from_list([{**row, "expert_completions": give(row), **columns} for row in rows])


def expert_logps(model, tokenizer, dataset):
    """Mean log-probability per token of the first completion of each row."""
    prompts = tokenizer(list(dataset["prompt"]))["input_ids"]
    ends = [tokenizer(row[0])["input_ids"] + [tokenizer.eos_token_id] for row in dataset["expert_completions"]]
    return torch.stack([logps.mean() for logps in completion_logps(model, prompts, ends)])


def always_right(completions, **kwargs):
    """All rollouts are right, some more than others."""
    return [0.6 + len(completion.split()) / 100 for completion in completions]


# ---- Consequences ----------------------------------------------------------------------------------------------------------------------


def test_what_never_succeeds_alone_is_learnt_from_the_completions(tmp_path):
    """The six problems with the longest ways. Alone nothing happens; with injected solutions, those become likely, and rollouts succeed."""
    rows = sorted(expert_dataset(64, num_completions=1), key=lambda row: -len(row["expert_completions"][0].split()))
    data = Dataset.from_list(rows[:6])
    run = {"train_dataset": data, "max_steps": 40, "learning_rate": 3e-3, "per_device_train_batch_size": 24, "seed": 2}
    alone = trained(tmp_path / "alone", settings=PLAIN, **run)
    assert sum(logged(alone, "reward")) == 0
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    before = expert_logps(AutoModelForCausalLM.from_pretrained(POLICY), tokenizer, data)
    trainer = trained(tmp_path / "injected", **run)
    after = expert_logps(trainer.model.eval(), tokenizer, data)
    assert (after > before).all()
    assert sum(logged(trainer, "reward")[:5]) == 0
    assert sum(logged(trainer, "reward")[-5:]) / 5 > 0.2
    assert logged(trainer, "guidance/injection/logp_after")[0] > logged(trainer, "guidance/injection/logp")[0]
    assert logged(trainer, "guidance/injection/groups")[0] == 1.0
    assert logged(trainer, "guidance/injection/groups")[-1] < 0.7  # groups that succeed need none


@pytest.mark.parametrize("changes", [
    {},
    {"injection_trigger": "group_failed & with_probability", "injection_probability": 0.5, "injection_selector": "learned"},
    {"num_iterations": 2, "beta": 0.04, "injection_advantage": "group"},
])  # fmt: skip
def test_groups_that_succeed_are_plain_grpo_tensor_for_tensor(tmp_path, changes):
    plain = {name: value for name, value in changes.items() if not name.startswith("injection")}
    run = {"reward_funcs": always_right, "train_dataset": expert_dataset(16)}
    theirs = make_trainer(
        tmp_path / "a", trainer_class=WatchedGRPO, config_class=GRPOConfig, settings=PLAIN, **run, **plain
    )
    theirs.train()
    ours = trained(tmp_path / "b", **run, **changes)
    for output, expected in zip(ours.outputs, theirs.outputs, strict=True):
        assert output.keys() == expected.keys()
        assert all(torch.equal(output[name], value) for name, value in expected.items())
    for name, value in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value)
    assert logged(ours, "reward") == logged(theirs, "reward")
    assert not any(logged(ours, "guidance/injection/rows"))


@pytest.mark.parametrize("selector", ["random", "reward_gain", "learnable"])
def test_a_wrong_completion_is_never_reinforced(tmp_path, selector):
    """The verifier rejects it, so it stays out: the groups keep their failed rollouts, and nothing is learnt."""
    trainer = trained(tmp_path, train_dataset=with_completions(["R 1 R 2", "U U U"]), injection_selector=selector)
    assert all(len(batch.injection.injected) == 0 for batch in trainer.batches)
    assert not any("is_injected" in output or output["advantages"].any() for output in trainer.outputs)
    start = AutoModelForCausalLM.from_pretrained(POLICY)
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in start.state_dict().items())
    if selector != "reward_gain":  # which chooses nothing
        assert logged(trainer, "guidance/injection/accepted") == [0.0] * 3


def test_a_wrong_completion_inside_the_baseline_counts_against_itself(tmp_path):
    """LUFFY's way: it takes part, with the advantage that it deserves."""
    data = with_completions(["U U U"])
    trainer = trained(tmp_path, train_dataset=data, preset="luffy", guidance_schedule=None, guidance_steps=None,
                      reward_funcs=[path_reward, length_reward], reward_weights=[1.0, 0.5])  # fmt: skip
    for output in trainer.outputs:
        assert output["is_injected"].tolist() == [False, False, False, True] * 4
        assert (output["advantages"][output["is_injected"]] < 0).all()
    tokenizer = trainer.processing_class
    before = expert_logps(AutoModelForCausalLM.from_pretrained(POLICY), tokenizer, data)
    assert expert_logps(trainer.model.eval(), tokenizer, data).mean() < before.mean()


# ---- Whose place, which advantage ------------------------------------------------------------------------------------------------------


def test_the_worst_row_makes_room_and_the_others_keep_their_advantages(tmp_path):
    """With a reward that varies, the lowest rollout of each group goes. The baseline stays that of all rollouts."""

    def reward(completions, **kwargs):
        right = path_reward(completions, **{name: kwargs[name] for name in ("walls", "start", "goal")})
        return [0.6 * r + 0.4 * length for r, length in zip(right, length_reward(completions), strict=True)]

    trainer = trained(tmp_path, reward_funcs=reward, injection_trigger="always", guidance_coef=0.5, max_steps=1, injection_selector="first",
                      train_dataset=(data := expert_dataset(16)))  # fmt: skip
    (output,), (batch,) = trainer.outputs, trainer.batches
    sampled, is_injected = batch.sampled_rewards_per_func.view(4, 4), output["is_injected"].view(4, 4)
    assert is_injected.sum(1).tolist() == [1] * 4
    assert torch.equal(sampled[is_injected], sampled.min(1).values)
    solution = dict(zip(data["prompt"], data["expert_completions"], strict=True))
    for choice in batch.injection.injected:
        text = texts(trainer, output)[choice.row]
        assert text == solution[batch.rows[choice.row]["prompt"]][0]
        assert (
            output["completion_ids"][choice.row][len(choice.completion.token_ids) - 1]
            == trainer.processing_class.eos_token_id
        )
        (given,) = reward([text], **{name: [batch.rows[choice.row][name]] for name in ("walls", "start", "goal")})
        assert choice.rewards_per_func == pytest.approx([given])
        # Eq. 11: alpha (R - mean_on) / R_range
        own = sampled[choice.row // 4].mean().item()
        assert output["advantages"][choice.row].item() == pytest.approx(0.5 * (given - own), rel=1e-4)
    expected = (sampled - sampled.mean(1, keepdim=True)) / (sampled.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(output["advantages"].view(4, 4)[~is_injected], expected[~is_injected])


def test_luffy_puts_one_completion_into_each_group_and_its_baseline(tmp_path):
    """arXiv:2504.14945: A = R - mean over the on-policy rows and the expert's, here without the standard deviation, as its code has it."""
    trainer = trained(tmp_path, preset="luffy", guidance_schedule=None, guidance_steps=None, scale_rewards="none", max_steps=2,
                      loss_type="dr_grpo", reward_funcs=[path_reward, length_reward], reward_weights=[1.0, 0.5])  # fmt: skip
    for output, batch in zip(trainer.outputs, trainer.batches, strict=True):
        assert output["is_injected"].tolist() == [False, False, False, True] * 4
        rewards = (batch.rewards_per_func @ torch.tensor([1.0, 0.5])).view(4, 4)
        torch.testing.assert_close(output["advantages"].view(4, 4), rewards - rewards.mean(1, keepdim=True))


def test_the_longest_row_of_a_batch_may_be_a_guided_one_that_was_replaced(tmp_path):
    """Its tokens have importance weights, but no column of the batch."""
    trainer = trained(
        tmp_path,
        max_steps=4,
        num_guided_generations=1,
        entropy_threshold_init=1.0,
        guided_sampler="stepwise",
        guidance_weight_max=0.9,
        guided_importance_correction="token_truncate",
        injection_trigger="always",
        injection_selector="first",
        train_dataset=expert_dataset(64),
    )
    lengths = [
        (max(len(row) for row in batch.rollout.completion_ids), output["completion_ids"].size(1))
        for batch, output in zip(trainer.batches, trainer.outputs, strict=True)
    ]
    assert any(guided > seq for guided, seq in lengths)


def test_both_sources_in_one_group(tmp_path):
    """Of 8 rows 3 are guided and up to 1 is injected. A guided row that was replaced is no guided row any more."""
    trainer = trained(tmp_path, num_generations=8, num_guided_generations=3, entropy_threshold_init=1.0, injection_trigger="always",
                      guided_importance_correction="token_truncate", importance_ratio_max=1.5, per_device_train_batch_size=32)  # fmt: skip
    seen = set()
    for output, batch in zip(trainer.outputs, trainer.batches, strict=True):
        was_guided = torch.tensor(batch.is_guided).view(-1, 8)
        is_injected = output["is_injected"].view(-1, 8)
        assert torch.equal(output["is_guided"].view(-1, 8), was_guided & ~is_injected)
        sampled, rewards = (r[:, 0].view(-1, 8) for r in (batch.sampled_rewards_per_func, batch.rewards_per_func))
        span = torch.ones_like(rewards)
        expected = mixed_group_advantages(sampled, rewards, was_guided, is_injected, 1.0, span).flatten()
        rows = ~output["is_guided"]  # on these no importance weight acts
        torch.testing.assert_close(
            output["advantages"][rows], expected[rows].unsqueeze(1).expand(-1, output["advantages"].size(1))
        )
        seen |= {int(kind) for kind in (was_guided.long() + 2 * is_injected.long()).unique()}
    assert {0, 1} < seen  # on-policy, guided, and injected rows
    assert logged(trainer, "guidance/reward/injected")
    assert logged(trainer, "guidance/weight")


def test_injection_goes_on_where_guidance_has_no_threshold_yet(tmp_path):
    trainer = trained(tmp_path, num_generations=8, num_guided_generations=3, entropy_threshold_init=None, max_steps=2)
    assert [batch.num_guided for batch in trainer.batches] == [0, 3]
    assert all(batch.injection.injected for batch in trainer.batches)


def test_alpha_ends_injection(tmp_path):
    trainer = trained(tmp_path, max_steps=4, guidance_steps=2)
    assert ["is_injected" in output for output in trainer.outputs] == [True, True, False, False]


def test_caps_of_the_batch(tmp_path):
    trainer = trained(tmp_path, max_injected_per_batch=3)
    assert [len(batch.injection.injected) for batch in trainer.batches] == [3, 3, 3]
    assert logged(trainer, "guidance/injection/rows") == [3 / 16] * 3


def test_evaluation_is_never_injected(tmp_path):
    trainer = trained(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=16,
                      init={"eval_dataset": expert_dataset(4)}, log_completions=True)  # fmt: skip
    assert len(trainer.batches) == 1
    assert len(trainer.outputs) > 1
    assert logged(trainer, "eval_reward") == [0.0]


def test_own_objects(tmp_path):
    """From Python, triggers and selectors are objects; a class of one's own will do."""

    class Longest(Selector):
        def scores(self, candidates):
            return [float(len(completion.token_ids)) for completion in candidates.completions]

    data = with_completions(lambda row: expert_dataset(16)["expert_completions"][0])
    init = {"injection_trigger": Always() & WithProbability(1.0), "injection_selector": Longest()}
    trainer = build(tmp_path, train_dataset=data, init=init, injection_advantage="group")
    trainer.train()
    longest = max(len(text.split()) for text in data["expert_completions"][0])
    for batch in trainer.batches:
        assert {len(choice.completion.token_ids) for choice in batch.injection.injected} == {longest + 1}
        assert {choice.selector for choice in batch.injection.injected} == {"Longest"}
    assert logged(trainer, "guidance/injection/trigger/always") == [1.0] * 3


# ---- Weights: the gradient is that of the written objective ----------------------------------------------------------------------------


def token_objective(logps, behaviour, mask, correction, gamma, max_ratio):
    """What the docstring of `injected_importance_weight` says is maximised, per token and without the advantage."""
    pi = logps.exp()
    if correction == "none":
        return logps
    if correction == "policy_shaping":
        return pi / (pi + gamma)
    if correction == "sequence_policy_shaping":
        mean = ((logps * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp()
        return (mean / (mean + gamma)).expand_as(logps)  # T times the same: the mask sums it over T tokens
    ratio = logps - behaviour
    ratio = ratio if correction == "truncated" else (ratio * mask).sum(1, keepdim=True)
    return ratio.exp().clamp(max=max_ratio).detach() * logps


class WithGradients(Watched):
    """Compares the gradient of each loss with autograd of the objective, written anew."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        is_injected = inputs["is_injected"]
        if not is_injected.any():
            return loss
        assert not inputs["advantages"][~is_injected].any()  # all failed: the whole gradient is that of injected rows
        parameters = list(model.parameters())
        ours = torch.autograd.grad(loss, parameters, retain_graph=True)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        seq, mask_of = inputs["completion_ids"].size(1), inputs["completion_mask"].float()
        logps, entropies, _ = self._get_per_token_logps_and_entropies(model, ids, mask, seq, compute_entropy=True)
        args = self.args
        behaviour = inputs.get("behaviour_per_token_logps")
        objective = token_objective(
            logps, behaviour, mask_of, args.injection_correction, args.shaping_gamma, args.importance_ratio_max
        )
        per_token = -inputs["advantages"].unsqueeze(1) * objective * mask_of
        if args.top_entropy_quantile < 1:
            per_token = per_token * self.get_high_entropy_mask(
                entropies, inputs["completion_mask"], 1 - args.top_entropy_quantile
            )
        per_row, lengths = per_token.sum(1), mask_of.sum(1).clamp(min=1)
        expected_loss = {
            "grpo": (per_row / lengths).mean(),
            "sapo": (per_row / lengths).mean(),
            "bnpo": per_row.sum() / mask_of.sum(),
            "dr_grpo": per_row.sum() / (len(per_row) * args.max_completion_length),
            "luspo": per_row.mean(),
        }.get(args.loss_type, per_row.sum() / (inputs["num_items_in_batch"] / args.steps_per_generation))
        expected = torch.autograd.grad(expected_loss, parameters)
        scale = max(gradient.abs().max() for gradient in expected)
        difference = max((a - b).abs().max() for a, b in zip(ours, expected, strict=True))
        self.compared = [*getattr(self, "compared", []), (scale.item(), difference.item())]
        return loss


def assert_gradients_agree(trainer, iterations):
    assert len(trainer.compared) >= iterations
    for scale, difference in trainer.compared:
        assert scale > 1e-5
        assert difference <= 1e-6 * max(1.0, scale)


ITERATIONS = {"num_iterations": 3, "steps_per_generation": 2, "per_device_train_batch_size": 8, "max_steps": 6,
              "learning_rate": 3e-3, "trainer_class": WithGradients}  # fmt: skip


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_gradient_of_policy_shaping_is_that_of_f_pi_times_a_in_every_iteration(tmp_path, loss_type):
    """CISPO clamps the ratio to epsilon_high, which its paper sets to 5; TRL's default would scale every row alike."""
    epsilon_high = 5.0 if loss_type == "cispo" else None
    trainer = trained(tmp_path, loss_type=loss_type, epsilon_high=epsilon_high, **ITERATIONS)
    assert_gradients_agree(trainer, iterations=4)


def test_epsilon_high_of_cispo_scales_injected_rows_like_all_others(tmp_path):
    trainer = trained(tmp_path, loss_type="cispo", epsilon_high=0.5, **{**ITERATIONS, "max_steps": 1})
    ((scale, difference),) = trainer.compared[:1]
    assert difference == pytest.approx(0.5 * scale, rel=1e-4)  # 0.5 of the gradient is left


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "vespo"])
@pytest.mark.parametrize("correction", ["sequence_policy_shaping", "truncated", "sequence_truncated", "none"])
def test_the_gradient_of_the_other_corrections(tmp_path, correction, loss_type):
    tokenizer, generator = AutoTokenizer.from_pretrained(POLICY), torch.Generator().manual_seed(0)

    def logprobs(row):
        lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in row["expert_completions"]]
        return {"logps": [(-1.2 - 0.5 * torch.rand(n, generator=generator)).tolist() for n in lengths]}

    data = expert_dataset(16).map(logprobs)
    column = "logps" if "truncated" in correction else None
    trainer = trained(tmp_path, loss_type=loss_type, injection_correction=correction, importance_ratio_max=0.8 if column else None,
                      expert_logprobs_column=column, train_dataset=data, **ITERATIONS)  # fmt: skip
    assert_gradients_agree(trainer, iterations=4)


def test_the_weights_follow_the_policy_from_one_iteration_to_the_next(tmp_path):
    """The same rows again weigh what the updated policy makes of them; the buffered batch itself is not touched."""
    trainer = trained(tmp_path, num_iterations=2, max_steps=2, learning_rate=3e-3)
    first, second = trainer.micro_batches
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["advantages"].dim() == 1
    logps = logged(trainer, "guidance/injection/logp")
    assert logps[0] == pytest.approx(logps[1], abs=1e-4)  # before the update, as `old_per_token_logps` has it


def test_behaviour_log_probs_are_scored_by_the_expert_where_they_are_not_known(tmp_path):
    trainer = trained(
        tmp_path, injection_correction="truncated", expert_model_name_or_path=EXPERT, max_steps=1, temperature=0.8
    )
    (output,) = trainer.outputs
    expert = AutoModelForCausalLM.from_pretrained(EXPERT)
    for row in output["is_injected"].nonzero().flatten().tolist():
        prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()]
        completion = output["completion_ids"][row][output["completion_mask"][row].bool()]
        logits = expert(torch.cat([prompt, completion]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1] / 0.8
        expected = logits.log_softmax(-1).gather(-1, completion.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(
            output["behaviour_per_token_logps"][row, : len(completion)], expected, atol=1e-4, rtol=0
        )


def test_sequence_level_ratios_take_one_weight_per_completion(tmp_path):
    for correction in ("sequence_policy_shaping", "none"):
        trainer = trained(tmp_path / correction, importance_sampling_level="sequence", injection_correction=correction,
                          num_iterations=2, loss_type="grpo")  # fmt: skip
        assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
        assert logged(trainer, "guidance/injection/logp_after")[0] > logged(trainer, "guidance/injection/logp")[0]


# ---- TRL's own settings on injected rows -----------------------------------------------------------------------------------------------


def test_the_clip_never_acts_on_injected_rows(tmp_path):
    """With the tightest clip and several updates on one batch, each still has the full gradient."""
    trainer = trained(tmp_path, epsilon=1e-6, loss_type="grpo", **ITERATIONS)
    assert_gradients_agree(trainer, iterations=4)
    assert not any(logged(trainer, "clip_ratio/high_mean"))


def test_completions_that_are_cut_count_in_full(tmp_path):
    changes = {"max_completion_length": 5, "overlong_expert_completions": "truncate", "injection_trigger": "always",
               "train_dataset": with_completions(["R 1 D 7 R 8"]), "injection_advantage": "group", "max_steps": 1}  # fmt: skip
    trainer = trained(tmp_path / "a", **changes)
    (output,) = trainer.outputs
    assert output["completion_mask"][output["is_injected"]].all()
    assert logged(trainer, "guidance/injection/overlong") == [1.0]


def test_overlong_completions_are_dropped_and_counted(tmp_path):
    data = with_completions(["R 1 " * 20, "R 1 D 7"])
    with pytest.warns(UserWarning, match="Of 8 expert completions read for a batch, 4 had more than max_.*=26 tokens"):
        trainer = trained(tmp_path, train_dataset=data, injection_advantage="group", injection_selector="first")
    assert logged(trainer, "guidance/injection/overlong") == [0.5] * 3
    assert {len(c.completion.token_ids) for batch in trainer.batches for c in batch.injection.injected} == {5}


def test_the_entropy_quantile_chooses_among_injected_tokens_too(tmp_path):
    """`top_entropy_quantile`: the gradient is that of the objective over tokens in which the policy is uncertain."""
    trainer = trained(tmp_path, top_entropy_quantile=0.4, loss_type="grpo", **ITERATIONS)
    assert_gradients_agree(trainer, iterations=4)


def test_the_off_policy_mask_never_drops_injected_rows(tmp_path):
    """Their ratio is 1 by definition, so their divergence is 0, also with a negative advantage."""
    dropped = []

    class Masked(Watched):
        @staticmethod
        def get_off_policy_mask(*args, **kwargs):
            dropped.append(GRPOTrainer.get_off_policy_mask(*args, **kwargs))
            return dropped[-1]

    trainer = trained(tmp_path, trainer_class=Masked, off_policy_mask_threshold=0.0, num_iterations=3, learning_rate=1e-2,
                      injection_advantage="group", injection_trigger="always", reward_funcs=length_reward,
                      train_dataset=with_completions(["R"]), injection_replaces="last")  # fmt: skip
    rows = [inputs["is_injected"] for inputs in trainer.micro_batches]
    kept = [mask.expand(len(row), -1)[row].bool().all() for mask, row in zip(dropped, rows, strict=True)]
    assert all(kept)
    others = [mask.expand(len(row), -1)[~row].bool().all() for mask, row in zip(dropped, rows, strict=True)]
    assert not all(others)  # while others are


def test_the_kl_term_covers_injected_rows_unweighted(tmp_path):
    """beta times TRL's estimate, on every row alike: the loss of the first step has none, since policy and reference agree."""
    with_kl = trained(tmp_path / "a", beta=0.5, max_steps=1)
    without = trained(tmp_path / "b", max_steps=1)
    assert logged(with_kl, "loss")[0] == pytest.approx(logged(without, "loss")[0], abs=1e-6)
    later = trained(tmp_path / "c", beta=0.5, max_steps=2, num_iterations=2, learning_rate=1e-2)
    assert logged(later, "kl")[1] > 0


class Engine:
    """Stands in for vLLM, which draws the rollouts and says with what probability: here always half of what the policy gives."""

    def __init__(self, trainer):
        self.trainer = trainer

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, **kwargs):
        ids = torch.tensor(prompts)
        with torch.no_grad():
            output = self.trainer.model.generate(ids, max_new_tokens=26, do_sample=True, top_k=0)
        completions = []
        for row in output[:, ids.size(1) :].tolist():
            end = row.index(self.trainer.processing_class.eos_token_id) + 1 if 1 in row else len(row)
            completions.append(row[:end])
        logps = completion_logps(self.trainer.model, prompts, completions)
        nested = [[[value - math.log(2)] for value in row.tolist()] for row in logps]
        return prompts, completions, nested, [[[token] for token in row] for row in completions]


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_the_ratio_of_an_inference_engine_is_1_on_injected_rows(tmp_path, mode):
    """The engine did not draw them. On rollouts TRL's ratio is what it was: 2 for each token here."""
    trainer = build(tmp_path, max_steps=2, vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=1e9)
    trainer.use_vllm, trainer.vllm_generation = True, Engine(trainer)
    trainer.args.use_vllm = True
    trainer.vllm_mode = "colocate"
    trainer._last_loaded_step = -1
    trainer.train()
    for output in trainer.outputs:
        ratio, rows = output["importance_sampling_ratio"], output["is_injected"]
        assert rows.any()
        assert (ratio[rows] == 1).all()
        tokens = output["completion_mask"].bool()
        expected = torch.full_like(ratio, 2.0)
        if mode == "sequence_mask":
            expected = 2.0 ** tokens.sum(1, keepdim=True)
            torch.testing.assert_close(ratio[~rows], expected[~rows], rtol=1e-2, atol=0)
        else:
            torch.testing.assert_close(ratio[~rows][tokens[~rows]], expected[~rows][tokens[~rows]], rtol=1e-3, atol=0)


def test_the_ratio_of_an_inference_engine_is_1_on_guided_rows(tmp_path):
    """It did not draw them either: half of their tokens are the expert's, and what is beside them has its own weight."""
    trainer = make_trainer(
        tmp_path,
        trainer_class=Watched,
        settings=GUIDED,
        max_steps=1,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=1e9,
    )
    trainer.use_vllm, trainer.vllm_generation = True, Engine(trainer)
    trainer.vllm_mode, trainer._last_loaded_step = "colocate", -1
    trainer.train()
    (output,) = trainer.outputs
    ratio, guided, tokens = (output[name] for name in ("importance_sampling_ratio", "is_guided", "completion_mask"))
    assert guided.sum() == 8
    assert (ratio[guided] == 1).all()
    own = ratio[~guided][tokens[~guided].bool()]
    torch.testing.assert_close(own, torch.full_like(own, 2.0), rtol=1e-3, atol=0)


# ---- Rewards ---------------------------------------------------------------------------------------------------------------------------


def test_only_what_is_chosen_is_scored_again_and_columns_stay_with_their_rows(tmp_path):
    calls = []

    def reward(completions, log_extra, log_metric, completion_ids, **kwargs):
        calls.append(len(completions))
        log_extra("words", [len(completion.split()) for completion in completions])
        log_metric("words/mean", sum(len(completion.split()) for completion in completions) / len(completions))
        assert [len(ids) for ids in completion_ids] == [len(completion.split()) + 1 for completion in completions]
        return path_reward(completions, **{name: kwargs[name] for name in ("walls", "start", "goal")})

    trainer = trained(tmp_path, reward_funcs=reward, max_steps=1, log_completions=True, max_injected_per_batch=3,
                      expert_sources_column="expert_sources")  # fmt: skip
    assert calls == [16, 4]  # the last one was one too many
    table = trainer._logs["extra"]
    assert list(table["words"]) == [len(text.split()) for text in trainer._logs["completion"]]
    assert sum(table["injected"]) == 3
    (batch,) = trainer.batches
    own = sum(len(ids) - 1 for ids in batch.completion_ids) / 16
    assert logged(trainer, "words/mean") == pytest.approx([own])  # of the policy's own rollouts
    for row, is_injected in enumerate(table["injected"]):
        assert (table["injection_source"][row] is None) == (table["injection_score"][row] is None) == (not is_injected)
        assert table["injection_selector"][row] == ("random" if is_injected else None)
    assert list(trainer._logs["advantages"]) == pytest.approx(trainer.outputs[0]["advantages"].tolist())


def test_reward_gain_scores_every_candidate_once(tmp_path):
    calls = []

    def reward(completions, **kwargs):
        calls.append(len(completions))
        return path_reward(completions, **{name: kwargs[name] for name in ("walls", "start", "goal")})

    data = with_completions(lambda row: ["U U", expert_dataset(16)["expert_completions"][0][0], "R"])
    trained(tmp_path, reward_funcs=reward, max_steps=1, train_dataset=data, injection_selector="reward_gain")
    assert calls == [16, 12]  # 3 completions for each of 4 groups


def test_where_nothing_is_chosen_nothing_is_scored(tmp_path):
    calls = []

    def reward(completions, **kwargs):
        calls.append(len(completions))
        return [0.0] * len(completions)

    trained(tmp_path, reward_funcs=reward, max_steps=2, injection_trigger="below", injection_threshold=-1.0)
    assert calls == [16, 16]


def test_a_reward_that_does_not_apply_leaves_the_completion_out(tmp_path):
    def reward(completions, **kwargs):
        return [0.0 if len(completions) == 16 else None for _ in completions]  # None where it is asked again

    trainer = trained(tmp_path, reward_funcs=reward, max_steps=1, injection_advantage="group")
    assert trainer.batches[0].injection.choices
    assert not trainer.batches[0].injection.injected


# ---- Models and data -------------------------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"


def as_conversation(row):
    answers = [[{"role": "assistant", "content": text}] for text in row["expert_completions"]]
    return {"prompt": [{"role": "user", "content": row["prompt"]}], "expert_completions": answers}


def of_conversation(completions, **kwargs):
    return path_reward(
        [completion[0]["content"] for completion in completions], **{n: kwargs[n] for n in ("walls", "start", "goal")}
    )


def test_conversations(tmp_path):
    """The same run as with texts: the template adds nothing but blanks."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.chat_template = TEMPLATE
    rows = Dataset.from_list([{**row, **as_conversation(row)} for row in expert_dataset(16)])
    init = {"processing_class": tokenizer}
    chat = trained(
        tmp_path / "a", train_dataset=rows, init=init, reward_funcs=of_conversation, injection_selector="first"
    )
    text = trained(tmp_path / "b", injection_selector="first")
    assert all(batch.injection.injected for batch in chat.batches)
    for ours, theirs in zip(chat.outputs, text.outputs, strict=True):
        assert torch.equal(ours["completion_ids"], theirs["completion_ids"])
        assert torch.equal(ours["advantages"], theirs["advantages"])


def test_an_adapter(tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = build(tmp_path, init={"peft_config": adapter}, injection_selector="learnable")
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora" in name for name in changed)


def test_mixed_precision_and_gradient_checkpointing(tmp_path):
    trainer = trained(tmp_path, bf16=True, gradient_checkpointing=True, injection_selector="learned")
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    assert all(batch.injection.injected for batch in trainer.batches)
    assert trainer.model.training


def test_what_is_looked_at_is_looked_at_without_dropout(tmp_path):
    """Twice the same, and no random number is drawn; afterwards the policy trains on with dropout."""
    model = AutoModelForCausalLM.from_pretrained(POLICY, attention_dropout=0.5)
    trainer = build(tmp_path, model=model)
    trainer.model.train()
    state = torch.get_rng_state()
    first, second = (trainer._policy_logps([[3, 9, 20]], [[5, 7, 1]])[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in trainer.model.modules())


def test_log_probs_of_given_completions_are_those_of_each_by_itself(tmp_path):
    """Prompts and completions of different lengths in one batch."""
    trainer = build(tmp_path)
    prompts, completions = [[3, 9, 20, 7], [4], [8, 8]], [[5, 7, 1], [6, 1], [9, 30, 2, 1]]
    expected = completion_logps(AutoModelForCausalLM.from_pretrained(POLICY), prompts, completions, batch_size=1)
    for ours, theirs in zip(trainer._policy_logps(prompts, completions), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("reward", "share"), [(0.4, 1.0), (0.6, 0.0)])
def test_a_rollout_is_right_if_it_earns_more_than_half_of_the_range(tmp_path, reward, share):
    trainer = trained(tmp_path, reward_funcs=lambda completions, **kwargs: [reward] * len(completions), max_steps=1)
    assert trainer.batches[0].injection.fired == {"group_failed": share}


@pytest.mark.parametrize(("correctness_reward", "share"), [("accuracy", 1.0), ("layout", 0.0), (None, 0.0)])
def test_one_function_may_decide_what_is_right(tmp_path, correctness_reward, share):
    """Wrong answers in the right layout have two of three rewards."""

    def accuracy(completions, **kwargs):
        return [float(index == -1) for index in range(len(completions))]

    def layout(completions, **kwargs):
        return [1.0] * len(completions)

    def style(completions, **kwargs):
        return layout(completions)

    trainer = trained(
        tmp_path, reward_funcs=[accuracy, layout, style], correctness_reward=correctness_reward, max_steps=1
    )
    assert trainer.batches[0].injection.fired == {"group_failed": share}


def test_a_range_that_divides_nothing_is_not_asked_for(tmp_path):
    """Inside the group's baseline, with a function that says what is correct. (What is said is an error here.)"""

    def big(completions, **kwargs):
        return [10.0 * (index % 4 == 0) for index in range(len(completions))]

    options = {"preset": "luffy", "guidance_schedule": None, "guidance_steps": None, "reward_funcs": big}
    trained(tmp_path / "a", **options, correctness_reward="big", max_steps=1)
    with pytest.warns(UserWarning, match="Reward function 'big' gives 10, but with reward_range unset"):
        trained(tmp_path / "b", **options, max_steps=1)


def test_completions_are_accepted_by_the_range_of_their_group(tmp_path):
    """A function that scores rollouts and not completions is in the range of both: 1 of 2 is not more than half."""

    def everywhere(completions, **kwargs):
        return [float("~" in completion) for completion in completions]

    def elsewhere(completions, **kwargs):
        return [None if "~" in completion else 0.0 for completion in completions]

    data = with_completions(["~ R 1"])
    trainer = trained(tmp_path, train_dataset=data, reward_funcs=[everywhere, elsewhere], max_steps=1)
    assert logged(trainer, "guidance/injection/rows") == [0.25]
    assert logged(trainer, "guidance/injection/accepted") == [0.0]
    injected = trainer.outputs[0]["is_injected"]
    assert trainer.outputs[0]["advantages"][injected].tolist() == [0.5] * 4  # of a range of 2, not of 1


def test_a_reward_that_is_only_watched_divides_nothing_by_0(tmp_path):
    """The one that counts punishes the policy and is silent where a function of weight 0 speaks: a range of 0 would make every parameter NaN."""

    def penalty(completions, **kwargs):
        return [None if "~" in completion else -0.5 for completion in completions]

    def watched_only(completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    with pytest.warns(UserWarning, match="Reward function 'penalty' gives -0.5, but with reward_range unset"):
        trainer = trained(
            tmp_path,
            train_dataset=with_completions(["~ R 1"]),
            reward_funcs=[penalty, watched_only],
            reward_weights=[1.0, 0.0],
            max_steps=1,
        )
    assert trainer.outputs[0]["advantages"].tolist() == pytest.approx([0.0, 0.0, 0.0, 0.5] * 4)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_the_tokenizers_own_end_token_is_appended(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(POLICY)
    model.generation_config.eos_token_id = [0, 1]
    trainer = trained(tmp_path, model=model, max_steps=1)
    assert trainer.eos_token_ids == [0, 1]
    choices = trainer.batches[0].injection.injected
    assert {choice.completion.token_ids[-1] for choice in choices} == {trainer.processing_class.eos_token_id} == {1}


def test_the_same_completion_does_not_come_twice_into_one_group(tmp_path):
    trainer = trained(tmp_path, train_dataset=with_completions(["R 1 D 7", "R 1 D 7"]), num_injected_completions=2, max_steps=1,
                      injection_advantage="group")  # fmt: skip
    assert len(trainer.batches[0].injection.injected) == 4  # one for each group


@pytest.mark.parametrize("selector", ["first", "random", "shortest", "learnable", "novel", "diverse", "reward_gain", "learned",
                                      "reward_gain & novel | shortest"])  # fmt: skip
def test_every_selector_trains(tmp_path, selector):
    trainer = trained(tmp_path, injection_selector=selector, num_injected_completions=2, max_steps=2)
    assert all(len(batch.injection.injected) == 8 for batch in trainer.batches)


@pytest.mark.parametrize("trigger", ["always", "group_failed", "zero_variance", "below", "with_probability"])
def test_every_trigger_fires(tmp_path, trigger):
    trainer = trained(tmp_path, injection_trigger=trigger, max_steps=2)
    assert logged(trainer, f"guidance/injection/trigger/{trigger}") == [1.0, 1.0]


def test_the_probability_follows_its_schedule(tmp_path):
    """Linear from 1 to 0 over 4 steps: at step 2 it is 1/2."""
    trainer = build(
        tmp_path,
        injection_trigger="with_probability",
        injection_probability_schedule="linear",
        guidance_steps=4,
        max_steps=8,
    )
    trainer.train()
    (trigger,) = trainer._injector.trigger.parts()
    assert [trigger.probability(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


# ---- Metrics ---------------------------------------------------------------------------------------------------------------------------


def test_metrics_of_injection_and_of_the_policy(tmp_path):
    trainer = trained(tmp_path, injection_trigger="always", reward_funcs=[path_reward, length_reward], reward_weights=[1.0, 0.5],
                      expert_sources_column="expert_sources", max_steps=2, per_device_train_batch_size=32)  # fmt: skip
    for entry, output, batch in zip(trainer.state.log_history, trainer.outputs, trainer.batches, strict=False):
        weights = torch.tensor([1.0, 0.5])
        sampled, rewards = batch.sampled_rewards_per_func @ weights, batch.rewards_per_func @ weights
        rows, mask = output["is_injected"], output["completion_mask"].bool()
        choices = batch.injection.injected
        expected = {
            "reward": sampled.mean(),  # replaced rollouts included: what the policy did
            "rewards/path_reward/mean": batch.sampled_rewards_per_func[:, 0].mean(),
            "completions/mean_length": torch.tensor([float(len(ids)) for ids in batch.completion_ids]).mean(),
            "guidance/reward/injected": rewards[rows].mean(),
            "guidance/rescued_groups": ((rewards.view(8, 4) > 0.75) & rows.view(8, 4)).any(1).float().mean()
            - ((sampled.view(8, 4) > 0.75).any(1) & (rewards.view(8, 4) > 0.75).any(1)).float().mean(),
            "guidance/injection/rows": rows.float().mean(),
            "guidance/injection/groups": torch.tensor(len({c.group for c in choices}) / 8),
            "guidance/injection/accepted": torch.tensor(1.0),
            "guidance/injection/source/expert 0/rows": torch.tensor(sum(c.completion.source == "expert 0" for c in choices) / 32),
            "guidance/injection/completions/mean_length": mask[rows].sum(1).float().mean(),
        }  # fmt: skip
        assert {name: entry[name] for name in expected} == pytest.approx(
            {n: v.item() for n, v in expected.items()}, rel=1e-4
        )
        assert 0 < entry["guidance/injection/gradient_share"] < 1
        assert entry["guidance/selection_time"] > 0


def test_the_share_of_the_gradient_and_the_log_probs_are_those_of_the_loss(tmp_path):
    trainer = trained(tmp_path, injection_trigger="always", reward_funcs=length_reward, max_steps=1, learning_rate=0.0)
    (output,) = trainer.outputs
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, output["completion_ids"].size(1)
        )
    rows, tokens = output["is_injected"].unsqueeze(1), output["completion_mask"].bool()
    weights = injected_importance_weight(logps, None, tokens & rows, "policy_shaping")
    size = output["advantages"].abs().unsqueeze(1) * weights * tokens
    assert logged(trainer, "guidance/injection/gradient_share") == pytest.approx(
        [(size[tokens & rows].sum() / size.sum()).item()], rel=1e-4
    )
    assert logged(trainer, "guidance/injection/logp") == pytest.approx([logps[tokens & rows].mean().item()], rel=1e-4)


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_metrics_of_an_update_do_not_depend_on_its_micro_batches(tmp_path, micro_batch):
    settings = {
        "injection_trigger": "always",
        "reward_funcs": length_reward,
        "max_steps": 1,
    }
    whole = trained(tmp_path / "a", **settings, per_device_train_batch_size=16)
    parts = trained(
        tmp_path / "b",
        **settings,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=16 // micro_batch,
    )
    for name in ("gradient_share", "logp"):
        (expected,), (got,) = (logged(trainer, f"guidance/injection/{name}") for trainer in (whole, parts))
        assert got == pytest.approx(expected, rel=1e-4)


def test_entropy_means_the_policy(tmp_path):
    trainer = trained(tmp_path, max_steps=1)
    (output,) = trainer.outputs
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    model = AutoModelForCausalLM.from_pretrained(POLICY)
    with torch.no_grad():
        probs = (
            model(input_ids=ids, attention_mask=mask)
            .logits[:, output["prompt_ids"].size(1) - 1 : -1]
            .double()
            .softmax(-1)
        )
    entropies = torch.special.entr(probs).sum(-1)[
        output["completion_mask"].bool() & ~output["is_injected"].unsqueeze(1)
    ]
    assert logged(trainer, "entropy") == pytest.approx([entropies.mean().item()], rel=1e-4)


def test_what_comes_of_injections_is_seen_when_prompts_come_back(tmp_path):
    """Four problems, all in every batch: from the second on, each step judges the one before."""
    trainer = trained(tmp_path, train_dataset=expert_dataset(4), max_steps=3, injection_selector="learned")
    assert [len(batch.injection.effects) for batch in trainer.batches] == [0, 4, 4]
    (learner,) = trainer._injector.selector.learners()
    assert learner.model.num_outcomes == 8
    assert len(logged(trainer, "guidance/injection/success_change")) == 2
    assert len(logged(trainer, "guidance/injection/predicted_change")) == 2
    assert all(0 <= value <= 1 for value in logged(trainer, "guidance/injection/calibration_error"))


# ---- Checkpoints and processes ---------------------------------------------------------------------------------------------------------

# Prompts come back within an epoch: TRL draws another order of prompts when it resumes in a later one.
REPEATED = Dataset.from_list(6 * list(expert_dataset(8, num_completions=4)))
MEMORY = {"injection_selector": "learned & novel", "train_dataset": REPEATED, "seed": 3,
          "injection_trigger": "group_failed & with_probability", "injection_probability": 0.8}  # fmt: skip


def test_a_resumed_run_ends_where_an_unbroken_one_ends(tmp_path):
    """Novelty memory, what the selector has learnt, and the random numbers of trigger and selector: all come from the checkpoint."""
    whole = trained(tmp_path / "whole", max_steps=6, **MEMORY)
    trained(tmp_path / "broken", max_steps=6, save_strategy="steps", save_steps=3, **MEMORY)
    state = json.loads((tmp_path / "broken" / "checkpoint-3" / STATE_FILE).read_text())["injection"]
    assert state["num_batches"] == 3
    assert state["memory"]["injected"]
    assert state["learners"][0]["num_outcomes"] > 0
    resumed = build(tmp_path / "broken", max_steps=6, **MEMORY)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
    assert json.dumps(resumed._injector.state_dict()) == json.dumps(whole._injector.state_dict())
    for ours, theirs in zip(resumed.batches, whole.batches[3:], strict=True):
        assert ours.injection.injected == theirs.injection.injected


PROCESSES = """
import json, sys, torch
from datasets import Dataset
from tests.processes import leave
from tests.test_injected_training import Watched, build, logged
from tests.training import expert_dataset
# Greedy rollouts, so that they do not depend on who draws them.
# Some of the completions are wrong, so that it matters whose reward is whose.
rows = [{**row, "expert_completions": [row["expert_completions"][0], "U U", row["expert_completions"][2]]}
        for row in expert_dataset(5, num_completions=3)]
trainer = build(sys.argv[1], max_steps=4, per_device_train_batch_size=int(sys.argv[2]), generation_kwargs={"do_sample": False, "top_k": None},
                train_dataset=Dataset.from_list(rows), injection_selector="learned & random", max_injected_per_batch=3,
                expert_sources_column="expert_sources", num_injected_completions=2, learning_rate=1e-3, seed=5)
trainer.train()
names = ["reward", "guidance/injection/rows", "guidance/injection/logp", "guidance/injection/logp_after", "guidance/injection/gradient_share",
         "guidance/injection/success_change", "guidance/injection/accepted", "guidance/injection/calibration_error", "entropy", "loss"]
record = {"logs": {name: logged(trainer, name) for name in names}, "state": trainer._injector.state_dict(),
          "weights": trainer.accelerator.unwrap_model(trainer.model).lm_head.weight.tolist(),
          "injected": [[(c.row, c.completion.token_ids) for c in batch.injection.injected] for batch in trainer.batches],
          "lengths": [len(batch.rows) for batch in trainer.batches]}
with open(f"{sys.argv[1]}/rank{trainer.accelerator.process_index}.json", "w") as file:
    json.dump(record, file)
leave()
"""


def test_two_processes_give_the_result_of_one(tmp_path):
    script, root = tmp_path / "train.py", str(QUICKSTART.parents[1])
    script.write_text(PROCESSES)
    records = {}
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"] if number > 1 else []
        command = [sys.executable, *launch, str(script), str(folder), str(16 // number)]
        result = subprocess.run(
            command, cwd=root, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-3000:]
        records[number] = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(number)]
    (one,), (first, second) = records[1], records[2]
    assert first["lengths"] == [8] * 4
    assert first["state"] == second["state"]
    assert first["injected"] == second["injected"] == one["injected"]
    assert all(one["injected"])
    assert 0 < min(one["logs"]["guidance/injection/accepted"]) < 1
    assert first["weights"] == second["weights"]
    torch.testing.assert_close(torch.tensor(first["weights"]), torch.tensor(one["weights"]), rtol=0, atol=1e-5)
    for name, values in one["logs"].items():
        assert values, name
        assert first["logs"][name] == pytest.approx(values, rel=1e-3, abs=1e-5), name


# ---- Errors before training ------------------------------------------------------------------------------------------------------------


def test_log_probs_that_are_missing_are_scored(tmp_path):
    data = with_completions(["R 1 R 2"], num_problems=16, logps=[None])
    changes = {"injection_correction": "truncated", "expert_logprobs_column": "logps", "train_dataset": data}
    trainer = trained(tmp_path, **changes, init={"expert_model": EXPERT}, injection_advantage="group", max_steps=1)
    assert trainer.outputs[0]["behaviour_per_token_logps"].any()


def test_the_preset_needs_nothing_else(tmp_path):
    trainer = trained(tmp_path, settings=PLAIN, preset="selective", max_steps=2)
    assert trainer.args.injection_selector == "reward_gain"
    assert all(batch.injection.injected for batch in trainer.batches)
    assert isinstance(trainer.args, SelectiveGuidanceGRPOConfig)
