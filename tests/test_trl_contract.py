"""The private names of TRL that trainer.py relies on. If one of these fails after an update of TRL, revisit the line of trainer.py it names."""

import inspect
import math
from pathlib import Path

import pytest
import torch
from trl import GRPOTrainer
from trl.chat_template_utils import parse_response
from trl.generation import vllm_generation
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import is_async_callable

from tests.training import length_reward, make_plain_trainer
from trl_selective import SelectiveGuidanceGRPOTrainer

HOOKS = {
    "create_model_card": ("self", "model_name", "dataset_name", "tags"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_generate": ("self", "prompts"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_compute_loss": ("self", "model", "inputs"),
    "_log_completion_extra": ("self", "column", "values"),
    "log": ("self", "logs", "start_time"),
    "_save_optimizer_and_scheduler": ("self", "output_dir"),
    "_save_rng_state": ("self", "output_dir"),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_plain_trainer(tmp_path_factory.mktemp("trl"), GRPOTrainer, reward_funcs=length_reward)


@pytest.mark.parametrize("name", HOOKS)
def test_signatures_of_the_hooks(name):
    """trainer.py: the override of the same name."""
    assert tuple(inspect.signature(getattr(GRPOTrainer, name)).parameters) == HOOKS[name]


def test_the_hook_that_is_bound_by_name():
    """trainer.py: `_generate_single_turn` replaces these three arguments, wherever they stand."""
    assert {"prompt_ids", "multimodal_fields", "num_generations"} <= set(
        inspect.signature(GRPOTrainer._generate_single_turn).parameters
    )


def test_every_override_exists_in_trl():
    """A hook that TRL renames would be a method that nobody calls."""
    own = {"_check_run", "_set_up_expert", "_set_up_guidance", "_coins_in_the_engine", "_set_up_injection", "_render",
           "_sum_over_processes", "_plan_batch", "_entropy_threshold", "_guidance_coef", "_can_sample_together", "_sample_guided", "whole_policy", "_expert_at_hand", "_inject", "_sampled_batch", "_warn_of_overlong",
           "_score_completions", "_expert_logps", "_decode", "_policy_logps", "_log_last_injected", "_behaviour_logps", "_log_columns",
           "_rewards", "_warn_once", "_was_guided", "_apply_guidance", "_label_rows", "_log_batch",
           "_rollout_metrics", "_injection_metrics", "_batch_as_logged", "_training_run", "_save_picture"}  # fmt: skip
    ours = {name for name, value in vars(SelectiveGuidanceGRPOTrainer).items() if inspect.isfunction(value)} - own
    assert not {name for name in ours if not hasattr(GRPOTrainer, name)}
    assert not {name for name in own if hasattr(GRPOTrainer, name)}  # and ours must not shadow one of theirs


@pytest.mark.parametrize(
    ("attribute", "kind"),
    [
        ("_tokenizer", object),
        ("_is_vlm", bool),
        ("_metrics", dict),
        ("_logs", dict),
        ("_pending_extra_logs", dict),
        ("_pending_metrics", dict),
        ("chat_template", object),
        ("chat_template_kwargs", dict),
        ("eos_token_ids", list),
        ("max_completion_length", int),
        ("num_generations", int),
        ("temperature", float),
        ("scale_rewards", str),
        ("reward_weights", torch.Tensor),
        ("reward_funcs", list),
        ("reward_func_names", list),
        ("model_wrapped", object),
        ("use_transformers_continuous_batching", bool),
    ],
)
def test_attributes(trainer, attribute, kind):
    """trainer.py: `_set_up_guidance`, `_render`, `_can_sample_together`, `_sample_guided`, `_score_completions`, `_apply_guidance` and `_log_batch` read them."""
    assert hasattr(trainer, attribute)
    assert isinstance(getattr(trainer, attribute), kind)


def test_the_logs_are_the_last_generation_batch(trainer):
    """trainer.py: `_batch_as_logged` copies these columns."""
    assert {"prompt", "completion", "rewards", "advantages", "extra"} <= set(trainer._logs)
    assert trainer._logs["prompt"].maxlen == trainer.args.generation_batch_size
    assert trainer.log_completions is False


def test_reward_functions_are_called_where_they_stand(trainer):
    """trainer.py: `_rewards` puts others into `reward_funcs` for one call, and asks TRL which have to be awaited."""

    async def awaited(**columns):
        return [2.0]

    assert (is_async_callable(awaited), is_async_callable(length_reward)) == (True, False)
    funcs, trainer.reward_funcs = trainer.reward_funcs, [lambda **columns: [3.0]]
    try:
        rewards = trainer._calculate_rewards([{"prompt": "1"}], ["1"], ["2"], [[4]])
    finally:
        trainer.reward_funcs = funcs
    assert rewards.tolist() == [[3.0]]


def test_generation_context(trainer):
    """trainer.py: `whole_policy` has the policy with the weights and in the mode that TRL samples."""
    assert "gather_deepspeed3_params" in inspect.signature(unwrap_model_for_generation).parameters


def test_what_is_repaired_is_what_trl_logs(trainer):
    """trainer.py: `_log_batch` overwrites the last entry of these, and `_compute_loss` that of `entropy`."""
    trainer.train()
    logged = set(trainer.state.log_history[0])
    lengths = {f"completions/{kind}_length" for kind in ("mean", "min", "max")}
    terminated = {f"completions/{kind}_terminated_length" for kind in ("mean", "min", "max")}
    rewards = {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/length_reward/mean",
        "rewards/length_reward/std",
    }
    assert rewards | lengths | terminated | {"completions/clipped_ratio", "entropy"} <= logged


def test_the_loss_takes_one_advantage_per_token(trainer):
    """trainer.py: `_apply_guidance` returns (B, T) advantages with an importance correction. Spread over the tokens, they change nothing."""
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    per_row = trainer._compute_loss(trainer.model, inputs)
    spread = inputs["advantages"].unsqueeze(1).expand(inputs["completion_ids"].shape)
    per_token = trainer._compute_loss(trainer.model, {**inputs, "advantages": spread})
    torch.testing.assert_close(per_token, per_row, rtol=1e-6, atol=1e-7)


def test_generation_returns_eight_things(trainer):
    """trainer.py: `_generate` replaces the second, the fourth and the fifth, and `_inject` reads the first."""
    trainer.model.train()
    prompts = ["2 7 8 13 17 20 25 28 33 0 > 21 :"] * 4
    prompt_ids, completion_ids, _, completions, logprobs, *rest = trainer._generate(prompts)
    assert len(rest) == 3
    assert logprobs is None
    assert prompt_ids == trainer.processing_class(prompts)["input_ids"]
    assert completions == trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)


def test_what_reward_functions_log_waits_in_two_dicts(trainer):
    """trainer.py: `_score_completions` exchanges them while it scores completions that are not in the batch yet."""
    trainer._log_completion_extra("column", [1, 2])
    trainer._log_metric("metric", 3.0)
    assert trainer._pending_extra_logs.pop("column") == [1, 2]
    assert trainer._pending_metrics.pop("metric") == [3.0]


def test_the_loss_reads_advantages_and_old_log_probs_after_its_forward(trainer, monkeypatch):
    """loss_inputs.py: `bind_to_policy` writes both into the inputs while the loss waits for its forward."""
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    before = trainer._compute_loss(trainer.model, inputs)
    forward, bound = trainer._get_per_token_logps_and_entropies, dict(inputs)

    def bind(*args, **kwargs):
        logps, entropies, aux_loss = forward(*args, **kwargs)
        bound["advantages"] = 2 * inputs["advantages"]
        bound["old_per_token_logps"] = logps.detach() + 0.1  # every ratio is exp(-0.1), within the clip
        return logps, entropies, aux_loss

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", bind)
    after = trainer._compute_loss(trainer.model, bound)
    torch.testing.assert_close(after, 2 * math.exp(-0.1) * before, rtol=1e-4, atol=1e-7)


def test_the_engine_is_built_by_a_name_of_its_module():
    """trainer.py: `_coins_in_the_engine` exchanges `LLM` there for one with our logits processor, and `_vllm_sampler` takes what comes of it."""
    build = vllm_generation.VLLMGeneration._init_vllm
    assert build.__globals__ is vars(vllm_generation)
    assert {"LLM", "llm"} <= set(build.__code__.co_names)  # self.llm = LLM(...)
    built_by = GRPOTrainer.__init__.__globals__["VLLMGeneration"]
    assert built_by is vllm_generation.VLLMGeneration
    assert "vllm_generation" in GRPOTrainer.__init__.__code__.co_names  # self.vllm_generation
    assert (
        "generation_kwargs" in vllm_generation.VLLMGeneration.generate.__code__.co_names
    )  # what requests are made of, last


def test_what_an_engine_draws_is_scored_token_by_token():
    """trainer.py: `_generate_single_turn` puts NaN beside TRL's numbers, one list for each row, and counts on the ratio 1 for them."""
    source = inspect.getsource(GRPOTrainer)
    assert "logprobs = [[lp[0] for lp in seq] for seq in logprobs]" in source
    assert "per_token_logps_diff = torch.nan_to_num(per_token_logps_diff, nan=0.0)" in source


def test_parsing_of_answers_takes_the_prompt():
    """trainer.py: `_decode` shows injected completions to reward functions as TRL shows its own."""
    assert {"tokenizer", "ids", "prefix"} <= set(inspect.signature(parse_response).parameters)


def test_the_loss_forward_returns_entropies(trainer, monkeypatch):
    """trainer.py: `_get_per_token_logps_and_entropies` unpacks log-probs, entropies and an auxiliary loss, and is called by the loss."""
    forward, shapes = trainer._get_per_token_logps_and_entropies, []

    def watch(*args, **kwargs):
        logps, entropies, aux_loss = forward(*args, **kwargs)
        shapes.append((logps.shape, entropies.shape))
        return logps, entropies, aux_loss

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", watch)
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer._compute_loss(trainer.model, inputs)
    assert shapes == [(inputs["completion_ids"].shape, inputs["completion_ids"].shape)]


def test_rows_lie_in_whole_groups_in_order(trainer):
    """trainer.py: `_plan_batch` guides the last rows of each group of `num_generations` consecutive rows."""
    rows = next(iter(trainer.get_train_dataloader()))
    prompts = [row["prompt"] for row in rows]
    assert all(prompts[i] == prompts[i - i % trainer.num_generations] for i in range(len(prompts)))
    assert len(set(prompts)) == len(prompts) // trainer.num_generations


def test_the_card_that_is_extended(trainer):
    """reporting/card.py: `extend_card`, `add_evaluation` and `complete_usage` look for these lines. trainer.py: `__init__` and `_training_run` set and
    read what names the method."""
    assert {"title", "id", "citation"} <= set(GRPOTrainer._paper)
    assert "grpo" in GRPOTrainer._tag_names
    trainer._name = "ANOTHER"
    trainer.create_model_card(model_name="plain")
    text = Path(trainer.args.output_dir, "README.md").read_text()
    for line in (
        "## Training procedure",
        "### Framework versions\n",
        "## Citations",
        "Cite ANOTHER as:",
        "Cite TRL as:",
    ):
        assert f"\n{line}\n" in text
    assert "a fine-tuned version of [None](https://huggingface.co/None)" in text
    assert 'model="None"' in text


def test_cards_come_with_checkpoints(tmp_path, monkeypatch):
    """trainer.py: `create_model_card` is called before each checkpoint is written, with the name of the model alone."""
    trainer = make_plain_trainer(tmp_path / "walker", GRPOTrainer, max_steps=2, save_strategy="steps", save_steps=1)
    calls = []

    def watch(*args, **kwargs):
        calls.append((args, kwargs, len(list(tmp_path.glob("walker/checkpoint-*")))))

    monkeypatch.setattr(trainer, "create_model_card", watch)
    trainer.train()
    assert calls == [((), {"model_name": "walker"}, 0), ((), {"model_name": "walker"}, 1)]
