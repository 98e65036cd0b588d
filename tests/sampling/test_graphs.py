"""Forwards of static shape, as CUDA graphs need them, give what plain ones give. On a CPU everything but the graphs themselves is tested."""

import sys
import types

import pytest
import torch

from tests.models import ARCHITECTURES, FORGETFUL, MINDFUL, tiny_adapter, tiny_model
from tests.sampling.reference import PROMPTS, Guidance, assert_recorded
from trl_selective.sampling import graphs, grouped_attention, kv, live_rows
from trl_selective.sampling.graphs import GraphedModel, cached_model, has_static_forward
from trl_selective.sampling.kv import CachedModel

KINDS = ["stepwise", "coin", 1, 3, 8]
RAMP = Guidance(threshold=1.2)
MANY_REJECTIONS = Guidance("constant", max_weight=0.9, vocab_size=30)


@pytest.fixture
def static_forwards(monkeypatch):
    """Static forwards on the CPU: the widths of the blocks that were read."""
    widths = []
    read = graphs.StaticForward.read

    def read_and_note(self, token_ids, attention_mask, position_ids, width, is_aside):
        widths.append(width)
        assert token_ids.shape[1] <= width
        return read(self, token_ids, attention_mask, position_ids, width, is_aside)

    monkeypatch.setattr(graphs.StaticForward, "read", read_and_note)
    monkeypatch.setattr(live_rows, "cached_model", GraphedModel)
    monkeypatch.setattr(graphs, "PATIENCE", 1)
    return widths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", FORGETFUL)
def test_every_number_is_that_of_a_fresh_forward(architecture, kind, static_forwards):
    models = tiny_model(seed=1, architecture=architecture), tiny_model(seed=2, architecture=architecture)
    prompts = PROMPTS * 4
    rollout = RAMP.sample(kind, *models, prompts, length=12, eos={1})
    assert (
        len(set(map(len, rollout.completion_ids))) > 2
    )  # rows end at different times, until the last half is gone too
    assert_recorded(rollout, *models, prompts, RAMP)
    assert {"stepwise": {1}, 1: {1}, 3: {1, 4}, 8: {1, 8}}.get(kind, {1}) <= set(static_forwards)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rollout_is_that_of_plain_forwards(kind, static_forwards, monkeypatch):
    models = tiny_model(seed=1), tiny_model(seed=2)
    is_guided = [True, False, True] * 4
    rollouts = []
    for read_by in (GraphedModel, CachedModel):
        monkeypatch.setattr(live_rows, "cached_model", read_by)
        torch.manual_seed(0)
        rollouts.append(RAMP.sample(kind, *models, PROMPTS * 4, length=12, eos={1}, is_guided=is_guided))
    ours, plain = rollouts
    assert static_forwards
    assert ours.completion_ids == plain.completion_ids
    assert ours.expert_drawn == plain.expert_drawn
    assert (ours.policy_forwards, ours.expert_forwards) == (plain.policy_forwards, plain.expert_forwards)


def test_holes_are_removed_while_dead_rows_are_still_there(static_forwards, monkeypatch):
    repacks = []
    keep_columns = GraphedModel.keep_columns

    def keep(self, columns):
        repacks.append(self._static is not None and self._static.live is not None)
        keep_columns(self, columns)

    monkeypatch.setattr(GraphedModel, "keep_columns", keep)
    models = tiny_model(seed=1, vocab_size=30), tiny_model(seed=2, vocab_size=30)
    prompts = PROMPTS * 6
    rollout = MANY_REJECTIONS.sample(8, *models, prompts, length=30, eos={1})
    assert len(set(repacks)) == 2  # with and without
    assert_recorded(rollout, *models, prompts, MANY_REJECTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_caches_outgrow_their_room(kind, static_forwards, monkeypatch):
    monkeypatch.setattr(kv, "ROOM", 3)
    monkeypatch.setattr(kv, "STEP", 1)
    models = tiny_model(seed=1), tiny_model(seed=2)
    rollout = RAMP.sample(kind, *models, PROMPTS * 3, length=30, eos={1})
    assert_recorded(rollout, *models, PROMPTS * 3, RAMP)


def test_dead_rows_leave_when_they_are_half_of_the_cache_for_a_while(static_forwards, monkeypatch):
    monkeypatch.setattr(graphs, "PATIENCE", 3)
    models, numbers_of_rows = tuple(tiny_model(seed, vocab_size=30) for seed in (1, 2)), []
    hook = models[0].register_forward_pre_hook(
        lambda _, args, kwargs: numbers_of_rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    rollout = MANY_REJECTIONS.sample("stepwise", *models, PROMPTS * 8, length=50, eos={1, 2, 3, 4})
    hook.remove()
    read, lengths = numbers_of_rows[1:], list(map(len, rollout.completion_ids))  # the first read the prompts
    live = [sum(length > position for length in lengths) for position in range(len(read))]
    wasted = [rows for rows, alive in zip(read, live, strict=True) if 2 * alive <= rows]
    assert read[0] == 24
    assert len(set(wasted)) > 1
    assert max(map(wasted.count, wasted)) == 3 + 1
    assert read == sorted(read, reverse=True)


@pytest.mark.parametrize("kind", [3, "coin"])
def test_long_blocks_are_read_plainly(kind, static_forwards, monkeypatch):
    """By turns with short ones, in the case of the coin."""
    monkeypatch.setattr(graphs, "MAX_TOKENS", 1)
    models = tiny_model(seed=1), tiny_model(seed=2)
    prompts = PROMPTS[1:2] * 2  # few rows: the expert is asked now and then
    rollout = RAMP.sample(kind, *models, prompts, length=30)
    assert set(static_forwards) == {1}
    assert_recorded(rollout, *models, prompts, RAMP)


def test_a_base_that_is_its_own_expert(static_forwards):
    """One model with its adapter on and off has two caches."""
    policy = tiny_adapter(1)
    expert = tiny_model(seed=1)
    rollout = RAMP.sample(3, policy, expert, PROMPTS, length=12)
    assert static_forwards
    assert_recorded(rollout, policy, expert, PROMPTS, RAMP)


def test_keys_and_values_are_not_repeated(static_forwards, monkeypatch):
    num_heads = set()
    usual = grouped_attention.scaled_dot_product_attention
    monkeypatch.setattr(
        grouped_attention,
        "scaled_dot_product_attention",
        lambda query, key, *rest, **options: num_heads.add(key.shape[1]) or usual(query, key, *rest, **options),
    )
    model = tiny_model(seed=1, num_attention_heads=4, num_key_value_heads=2)
    RAMP.sample(3, model, model, PROMPTS, length=6)
    assert num_heads == {2}


def test_the_expert_is_waited_for_even_if_the_policy_fails(static_forwards, monkeypatch):
    """Else what it writes into its cache could end up in memory that others were given meanwhile."""
    events = []
    begin, join = GraphedModel.begin, graphs.StaticForward.join
    monkeypatch.setattr(GraphedModel, "begin", lambda *block: events.append("begun") or begin(*block))
    monkeypatch.setattr(graphs.StaticForward, "join", lambda forward: events.append("joined") or join(forward))
    policy, expert = tiny_model(seed=1), tiny_model(seed=2)

    def fail(*_):
        if events and events[-1] == "begun":
            raise KeyError("the policy fails")

    policy.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="the policy fails"):
        RAMP.sample(3, policy, expert, PROMPTS, length=12)
    assert events[-2:] == ["begun", "joined"]


# Which models.


def test_graphs_are_for_accelerators():
    assert type(cached_model(tiny_model(1), "policy", 9)) is CachedModel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_attention_can_be_static(architecture):
    model = tiny_model(1, architecture=architecture)
    assert has_static_forward(model) == (architecture in FORGETFUL)
    assert architecture in [*FORGETFUL, *MINDFUL, "recurrent"]


def change_attention(model):
    model.set_attn_implementation("eager")


def change_devices(model):
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}


def change_weights(model):
    model.is_quantized = True


def change_masks(model):
    module = types.ModuleType("modeling_of_its_own")
    sys.modules[module.__name__] = module
    model.__class__ = type("Own", (type(model),), {"__module__": module.__name__})


def change_positions(model):
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def change_positions_of_some_layers(model):
    kinds = {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "longrope"}}
    model.config.rope_parameters = kinds


def change_distances(model):
    model.config.alibi = True  # as Falcon's older models have it


CHANGES = [
    change_attention,
    change_devices,
    change_weights,
    change_masks,
    change_positions,
    change_positions_of_some_layers,
    change_distances,
]


@pytest.mark.parametrize("change", CHANGES)
def test_other_models_are_read_plainly(change):
    model = tiny_model(1)
    assert has_static_forward(model)
    change(model)
    assert not has_static_forward(model)


def test_an_adapter_changes_nothing_about_that():
    assert has_static_forward(tiny_adapter(1))


# On an accelerator.


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_give_the_rollout_of_plain_forwards(kind, monkeypatch):
    models = tiny_model(seed=1).cuda(), tiny_model(seed=2).cuda()
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(graphs.torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    rollouts = []
    for make in (cached_model, CachedModel):
        monkeypatch.setattr(live_rows, "cached_model", make)
        torch.manual_seed(0)
        rollouts.append(RAMP.sample(kind, *models, PROMPTS * 10, length=40, eos={1}))
    ours, plain = rollouts
    assert len(replays) > 10
    assert ours.completion_ids == plain.completion_ids
    assert ours.expert_drawn == plain.expert_drawn
    for row, logps in zip(ours.sampling_per_token_logps, plain.sampling_per_token_logps, strict=True):
        assert row == pytest.approx(logps, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [1, 4])
def test_models_that_read_side_by_side_do_not_disturb_each_other(kind, monkeypatch):
    large = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8}
    large |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2000, "max_position_embeddings": 512}
    models = [tiny_model(seed, **large).cuda() for seed in (1, 2)]
    for model in models:
        for weight in model.parameters():
            weight.data.mul_(0.05)  # of models as wide as this
    guidance, prompts = Guidance("constant", max_weight=0.3, vocab_size=2000), PROMPTS * 16
    is_aside, rollouts = [], []
    read = graphs.StaticForward.read
    monkeypatch.setattr(
        graphs.StaticForward,
        "read",
        lambda forward, *inputs: (
            is_aside.append(inputs[-1] and forward.is_ready(inputs[-2])) or read(forward, *inputs)
        ),
    )
    for begin in (GraphedModel.begin, CachedModel.begin):
        monkeypatch.setattr(GraphedModel, "begin", begin)
        torch.manual_seed(0)
        rollouts.append(guidance.sample(kind, *models, prompts, length=200))
        assert any(is_aside) == (len(rollouts) == 1)
        is_aside.clear()
    assert rollouts[0] == rollouts[1]


@pytest.mark.gpu
def test_a_model_that_waits_for_the_device_is_read_plainly():
    class Waits(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, hidden):
            return self.module(hidden) if hidden.sum().item() == hidden.sum().item() else hidden

    policy, expert = tiny_model(seed=1).cuda(), tiny_model(seed=2).cuda()
    torch.manual_seed(0)
    expected = RAMP.sample("stepwise", policy, expert, PROMPTS * 4, length=12, eos={1})
    policy.model.norm = Waits(policy.model.norm)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="No CUDA graph can be made of the forward of LlamaForCausalLM"):
        ours = RAMP.sample("stepwise", policy, expert, PROMPTS * 4, length=12, eos={1})
    assert ours.completion_ids == expected.completion_ids
    assert type(cached_model(policy, "policy", 9)) is CachedModel
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(3, device="cuda").isfinite().all()
    torch.manual_seed(1)
    RAMP.sample(3, policy, expert, PROMPTS * 4, length=12, eos={1})  # and the other one goes on with graphs
