"""The samplers on models of many kinds: heads, precisions, adapters, positions and caches."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from tests.models import FORGETFUL, MINDFUL, AllLogits, Opaque, tiny_adapter, tiny_model
from tests.sampling.reference import PROMPTS, Guidance, assert_recorded, expected_record, fresh_probs
from trl_selective.sampling import SpeculativeSampler, can_forget_tokens

KINDS = ["stepwise", "coin", 3, 8]
LENGTH = 12
RAMP = Guidance(threshold=1.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("expert", FORGETFUL)
@pytest.mark.parametrize("policy", FORGETFUL)
def test_architectures_with_full_attention(policy, expert, kind):
    models = tiny_model(1, policy), tiny_model(2, expert)
    rollout = RAMP.sample(kind, *models, PROMPTS * 3, length=LENGTH, eos={1})
    assert_recorded(rollout, *models, PROMPTS * 3, RAMP)


def test_drafts_never_leave_the_table_of_positions():
    """GPT-2 has exactly as many positions as the longest prompt and its completion; rejected drafts would lie beyond."""
    policy, expert = tiny_model(1, "gpt2"), tiny_model(2, "gpt2")
    assert policy.config.n_positions == len(PROMPTS[0]) + LENGTH
    guidance = Guidance("constant", max_weight=0.5)
    for draft_length in (5, 12, 50):
        rollout = guidance.sample(draft_length, policy, expert, PROMPTS * 8, length=LENGTH)
        assert_recorded(rollout, policy, expert, PROMPTS * 8, guidance)


@pytest.mark.parametrize("architecture", MINDFUL)
@pytest.mark.parametrize("role", ["policy", "expert"])
def test_caches_that_cannot_forget(architecture, role):
    """Windows shorter than the prompt, convolutions, distances in columns: exact step by step, and refused for drafting."""
    names = {"policy": "llama", "expert": "llama"} | {role: architecture}
    models = [tiny_model(seed, name) for seed, name in enumerate(names.values())]
    assert not can_forget_tokens(models[role == "expert"].config)
    for kind in ("stepwise", "coin"):
        rollout = RAMP.sample(kind, *models, PROMPTS * 3, length=LENGTH, eos={1})
        assert_recorded(rollout, *models, PROMPTS * 3, RAMP)
    for rarely in (Guidance("constant", max_weight=0.15), Guidance("hard_gate", threshold=1.2, max_weight=0.3)):
        for prompt in (
            PROMPTS
        ):  # the expert has several tokens to read at a time; with a gate, it is not asked about all of them
            rollout = rarely.sample("coin", *models, [prompt], length=LENGTH)
            assert_recorded(rollout, *models, [prompt], rarely)
    message = rf"The {role} \(\w+For\w+\) has sliding-window or recurrent layers.*Use guided_sampler='coin'"
    with pytest.raises(ValueError, match=message):
        SpeculativeSampler(*models)


def test_a_window_matters():
    """So that the test above would see a wrong one."""
    wide = tiny_model(1, "sliding", sliding_window=None)
    narrow = tiny_model(1, "sliding")
    assert can_forget_tokens(wide.config)
    difference = fresh_probs(wide, [PROMPTS[0]], RAMP) - fresh_probs(narrow, [PROMPTS[0]], RAMP)
    assert difference[0, -1].abs().max() > 1e-2


@pytest.mark.parametrize("role", ["policy", "expert"])
def test_a_model_without_attention_is_named(role):
    models = [tiny_model(1), tiny_model(2, "recurrent")]
    with pytest.raises(ValueError, match=rf"The {role} \(MambaForCausalLM\) has recurrent layers alone"):
        RAMP.sampler("stepwise", *(models if role == "expert" else models[::-1]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_forgets_its_cache_is_named(kind):
    """One that reads what it is given, and keeps nothing of it, or not where it should."""
    forgets = tiny_model(2)
    forward = forgets.forward
    forgets.forward = lambda cache=None, past_key_values=None, **block: forward(**block)
    with pytest.raises(ValueError, match=r"The expert \(LlamaForCausalLM\) does not go on from its `cache`"):
        RAMP.sample(kind, tiny_model(1), forgets, PROMPTS, length=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("policy_head", "expert_head"), [(10, 7), (7, 10), (10, 12)])
def test_padded_heads(kind, policy_head, expert_head):
    """Ids that only one head has, or that no tokenizer has, are never drawn, however likely their logits say they are."""
    policy, expert = tiny_model(1, vocab_size=policy_head), tiny_model(2, vocab_size=expert_head)
    with torch.no_grad():
        for model in (policy, expert):
            model.lm_head.weight[7:] *= 20
    vocab_size = 7 if min(policy_head, expert_head) > 7 else None
    rollout = RAMP.sample(kind, policy, expert, PROMPTS * 20, length=LENGTH, eos={1}, vocab_size=vocab_size)
    assert max(map(max, rollout.completion_ids)) == 6
    assert_recorded(rollout, policy, expert, PROMPTS * 20, RAMP)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_only_the_policy_has(kind):
    """The policy draws them in rows of either kind, as it would alone; the expert never does."""
    policy, expert = tiny_model(1), tiny_model(2)
    guidance = Guidance(threshold=1.2, expert_vocab_size=4)
    is_guided = [row % 2 == 0 for row in range(60)]
    rollout = guidance.sample(kind, policy, expert, PROMPTS * 20, length=LENGTH, eos={1}, is_guided=is_guided)
    rows = {flag: [row for row, own in enumerate(is_guided) if own == flag] for flag in (True, False)}
    assert_recorded(rollout.take(rows[True]), policy, expert, [(PROMPTS * 20)[row] for row in rows[True]], guidance)
    alone = Guidance("constant", max_weight=0.0)
    assert_recorded(rollout.take(rows[False]), policy, expert, [(PROMPTS * 20)[row] for row in rows[False]], alone)
    for flag in rows:
        assert {4, 5, 6} & {token for row in rows[flag] for token in rollout.completion_ids[row]}
    drawn = zip(rollout.completion_ids, rollout.expert_drawn, strict=True)
    assert max(token for ids, flags in drawn for token, flag in zip(ids, flags, strict=True) if flag) < 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [Opaque, partial(torch.compile, backend="eager")], ids=["opaque", "compiled"])
def test_wrappers_that_hide_the_signature(kind, wrap):
    """Positions must arrive all the same: GPT-2 would count padding."""
    models = tiny_model(1, "gpt2"), tiny_model(2, "gpt2")
    rollout = RAMP.sample(kind, *map(wrap, models), PROMPTS * 3, length=LENGTH, eos={1})
    assert_recorded(rollout, *models, PROMPTS * 3, RAMP)


@pytest.mark.parametrize("role", ["policy", "expert"])
def test_virtual_tokens_are_refused(role):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    models = [get_peft_model(tiny_model(1), config), tiny_model(2)]
    with pytest.raises(ValueError, match=f"The {role} has a PrefixTuningConfig adapter.*such as LoRA"):
        RAMP.sampler("stepwise", *(models if role == "policy" else models[::-1]))


@pytest.mark.parametrize("role", ["policy", "expert"])
def test_an_adapter_that_waits_for_its_invocation_is_refused(role):
    """In a block without the invocation it is off: log pi would be wrong by up to 4."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[3, 4])
    models = [get_peft_model(tiny_model(1), config), tiny_model(2)]
    with pytest.raises(ValueError, match=f"The {role} has an adapter with alora_invocation_tokens.*Use LoRA without"):
        RAMP.sampler("stepwise", *(models if role == "policy" else models[::-1]))


def test_the_padding_of_a_long_prompt_leaves_with_it():
    """One prompt of 30 tokens that ends early: the others are then read in caches of their own length."""
    policy, expert = tiny_model(1), tiny_model(2)
    widths = []

    def note_width(_, args, kwargs):
        widths.append(kwargs["attention_mask"].shape[1])

    hook = policy.register_forward_pre_hook(note_width, with_kwargs=True)
    prompts = [[2] * 30, [3], [4, 5]]
    rollout = RAMP.sample("stepwise", policy, expert, prompts, length=20, eos={3})
    hook.remove()
    long, *others = map(len, rollout.completion_ids)
    assert long < min(others)
    assert widths.pop(0) == 29  # the prompts but for their last tokens
    assert max(widths[:long]) >= 30
    assert max(widths[long:]) <= 1 + 2 + max(others)
    assert_recorded(rollout, policy, expert, prompts, RAMP)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_returns_all_logits(kind, compiled):
    models = tiny_model(1), tiny_model(2)
    wrapped = [AllLogits(model) for model in models]
    if compiled:  # which hides what is taken, and what is not
        wrapped = [torch.compile(model, backend="eager") for model in wrapped]
    rollout = RAMP.sample(kind, *wrapped, PROMPTS * 3, length=LENGTH, eos={1})
    assert_recorded(rollout, *models, PROMPTS * 3, RAMP)


def test_a_vocabulary_larger_than_the_heads_is_that_of_the_heads():
    sampler = RAMP.sampler(3, tiny_model(1, vocab_size=9), tiny_model(2, vocab_size=8), vocab_size=100)
    assert sampler.vocab_size == 8


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind):
    """bfloat16 keeps 8 bits: logits of size 2 are right to about 1%, cached or not. Laws are taken in float32 all the same."""
    policy, expert = tiny_model(1).bfloat16(), tiny_model(2).bfloat16()
    rollout = RAMP.sample(kind, policy, expert, PROMPTS * 5, length=LENGTH, eos={1})
    assert_recorded(rollout, policy, expert, PROMPTS * 5, RAMP, tolerance=0.15)
    # A log-probability that went through bfloat16 would be one of its few values.
    logps = torch.tensor([logp for row in rollout.sampling_per_token_logps for logp in row])
    assert (logps != logps.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_in_float32_with_an_expert_in_bfloat16(kind):
    """What concerns the policy alone loses no digit to the expert's precision."""
    policy, expert = tiny_model(1), tiny_model(2).bfloat16()
    rollout = RAMP.sample(kind, policy, expert, PROMPTS * 5, length=LENGTH, eos={1})
    assert_recorded(rollout, policy, expert, PROMPTS * 5, RAMP, tolerance=0.15)
    for row, (prompt, completion) in enumerate(zip(PROMPTS * 5, rollout.completion_ids, strict=True)):
        expected = expected_record(policy, expert, prompt, completion, RAMP)
        assert rollout.policy_per_token_logps[row] == pytest.approx(expected.policy_logps.tolist(), abs=2e-4)
        assert rollout.guidance_weights[row] == pytest.approx(expected.weights.tolist(), abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ["policy", "expert"])
def test_an_adapter_is_part_of_the_model(kind, role):
    plain, with_adapter = tiny_model(1), tiny_adapter(2)
    with with_adapter.disable_adapter():
        without = fresh_probs(with_adapter, [PROMPTS[0]], RAMP)
    assert (fresh_probs(with_adapter, [PROMPTS[0]], RAMP) - without).abs().max() > 0.05
    models = (with_adapter, plain) if role == "policy" else (plain, with_adapter)
    rollout = RAMP.sample(kind, *models, PROMPTS * 3, length=LENGTH, eos={1})
    assert_recorded(rollout, *models, PROMPTS * 3, RAMP)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_is_named_and_works_once_turned_off(kind):
    """Where it turns the cache off, as before Transformers 5.24. The trainer turns it off while it samples."""
    policy, expert = tiny_model(1), tiny_model(2)
    policy.train()
    policy.gradient_checkpointing_enable()
    keeps_cache = Version(transformers.__version__) >= Version("5.24")
    message = r"The policy \(LlamaForCausalLM\) does not go on from its `past_key_values`.*Turn gradient"
    with nullcontext() if keeps_cache else pytest.raises(ValueError, match=message):
        rollout = RAMP.sample(kind, policy, expert, PROMPTS, length=LENGTH)
        assert_recorded(rollout, policy, expert, PROMPTS, RAMP)
    policy.gradient_checkpointing_disable()
    rollout = RAMP.sample(kind, policy, expert, PROMPTS, length=LENGTH)
    assert policy.training
    assert_recorded(rollout, policy, expert, PROMPTS, RAMP)
