"""Where memory does not suffice for all rows at once, they are drawn one half after the other, and are the same."""

import gc
import weakref
from contextlib import contextmanager
from itertools import product

import pytest
import torch

from tests.models import MINDFUL, tiny_model
from tests.sampling.reference import PROMPTS, Guidance, assert_recorded
from trl_selective.sampling import graphs, kv, live_rows
from trl_selective.sampling.graphs import GraphedModel
from trl_selective.sampling.live_rows import LiveRows

KINDS = ["stepwise", "coin", 1, 3]
LENGTH = 12
RAMP = Guidance(threshold=1.2)
RARE = Guidance("constant", max_weight=0.15)  # where the coin's expert is tokens behind
ROWS = PROMPTS * 4
OUT_OF_MEMORY = r"Out of memory with \d+ rollouts drawn at once: half of them wait"
IS_GUIDED = [True, False, True] * 4
W0 = Guidance("constant", max_weight=0.0)


@contextmanager
def memory_for(cells: int, *models):
    """Caches of these models may have so many cells, rows times columns: what each forward asks for."""
    asked = []

    def check(_, args, kwargs):
        asked.append(kwargs["input_ids"].shape[0] * kwargs["attention_mask"].shape[-1])
        if asked[-1] > cells:
            raise torch.OutOfMemoryError("out of memory")

    hooks = [model.register_forward_pre_hook(check, with_kwargs=True) for model in models]
    try:
        yield asked
    finally:
        for hook in hooks:
            hook.remove()


def draw(kind, guidance: Guidance, models, prompts=ROWS, eos=(), **options):
    torch.manual_seed(0)
    return guidance.sample(kind, *models, prompts, length=LENGTH, eos=eos, **options)


def assert_same(ours, expected):
    for field in ("completion_ids", "expert_drawn"):
        assert getattr(ours, field) == getattr(expected, field)


@pytest.mark.parametrize("guidance", [RAMP, RARE], ids=["ramp", "rare"])
@pytest.mark.parametrize("role", ["policy", "expert"])
@pytest.mark.parametrize(
    ("architecture", "kind"), [*product(["llama", "gpt2"], [*KINDS, 8]), *product(MINDFUL, ["stepwise", "coin"])]
)
def test_the_rollout_is_the_same(architecture, kind, role, guidance):
    models = tiny_model(1, architecture), tiny_model(2, architecture)
    expected = draw(kind, guidance, models, is_guided=IS_GUIDED)
    with memory_for(60, models[role == "expert"]) as asked, pytest.warns(UserWarning, match=OUT_OF_MEMORY):
        rollout = draw(kind, guidance, models, is_guided=IS_GUIDED)
    assert sum(cells > 60 for cells in asked) > 1  # halves were halved
    assert_same(rollout, expected)
    for law, of in ((guidance, True), (W0, False)):
        rows = [row for row, is_guided in enumerate(IS_GUIDED) if is_guided == of]
        assert_recorded(rollout.take(rows), *models, [ROWS[row] for row in rows], law)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_have_ended_are_left_alone(kind):
    models = tiny_model(1), tiny_model(2)
    expected = draw(kind, RAMP, models, eos={1})
    assert len(set(map(len, expected.completion_ids))) > 3
    with memory_for(50, *models), pytest.warns(UserWarning, match=OUT_OF_MEMORY):
        rollout = draw(kind, RAMP, models, eos={1})
    assert_same(rollout, expected)
    assert_recorded(rollout, *models, ROWS, RAMP)


@pytest.mark.parametrize("kind", KINDS)
def test_with_static_forwards(kind, monkeypatch):
    monkeypatch.setattr(live_rows, "cached_model", GraphedModel)
    monkeypatch.setattr(kv, "ROOM", 3)
    monkeypatch.setattr(kv, "STEP", 1)
    models = tiny_model(1), tiny_model(2)
    expected = draw(kind, RAMP, models)
    with memory_for(130, *models), pytest.warns(UserWarning, match=OUT_OF_MEMORY):
        rollout = draw(kind, RAMP, models)
    assert_same(rollout, expected)
    assert_recorded(rollout, *models, ROWS, RAMP)


def test_prompts_that_are_too_many_are_read_by_halves():
    models = tiny_model(1), tiny_model(2)
    prompts = [[token, 3, 4, 2] for token in range(2, 7)] + [[token, 4, 3, 2] for token in range(2, 7)]
    expected = draw("stepwise", RAMP, models, prompts)
    with memory_for(25, models[0]) as asked, pytest.warns(UserWarning, match=OUT_OF_MEMORY):
        rollout = draw("stepwise", RAMP, models, prompts)
    assert asked[0] == 30  # all texts, of three tokens each
    assert 15 in asked
    assert_same(rollout, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_retired", [False, True])
def test_no_token_is_lost_when_a_commit_fails(is_retired, kind, monkeypatch):
    """In its middle: all is written, and rows that have ended have left or have not."""
    models = tiny_model(1), tiny_model(2)
    expected = draw(kind, RARE, models, eos={1})
    retire, failed = LiveRows._retire, []

    def fail_once(self, finished):
        fails = bool(finished.any()) and not failed
        if fails:
            failed.append(len(self))
        if is_retired or not fails:
            retire(self, finished)
        if fails:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(LiveRows, "_retire", fail_once)
    with pytest.warns(UserWarning, match=OUT_OF_MEMORY):
        rollout = draw(kind, RARE, models, eos={1})
    assert_same(rollout, expected)
    assert_recorded(rollout, *models, ROWS, RARE)


def test_caches_of_rows_that_wait_are_free(monkeypatch):
    caches, alive = [], []
    usual = live_rows.cached_model

    def make(*args):
        model = usual(*args)
        caches.append(weakref.ref(model))
        return model

    def count(*_):
        gc.collect()
        alive.append(sum(cache() is not None for cache in caches))

    monkeypatch.setattr(live_rows, "cached_model", make)
    models = tiny_model(1), tiny_model(2)
    models[0].register_forward_pre_hook(count)
    with memory_for(60, *models), pytest.warns(UserWarning, match=OUT_OF_MEMORY):
        draw("stepwise", RAMP, models)
    assert len(caches) > 6
    assert set(alive) == {2}


def test_one_row_must_fit():
    models = tiny_model(1), tiny_model(2)
    with (
        memory_for(LENGTH // 2, models[0]),
        pytest.warns(UserWarning, match="Out of memory with 2 rollouts"),
        pytest.raises(torch.OutOfMemoryError),
    ):
        draw("stepwise", RAMP, models, [[2, 3], [3, 4]])


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_are_read_in_blocks(kind, monkeypatch):
    monkeypatch.setattr(kv, "MAX_BLOCK", 6)
    monkeypatch.setattr(kv, "MIN_WIDTH", 2)
    models = tiny_model(1), tiny_model(2)
    with memory_for(10**6, models[0]) as asked:
        rollout = draw(kind, RAMP, models)
    assert asked[:2] == [3 * 2, 3 * 4]  # three texts of up to four tokens
    assert_recorded(rollout, *models, ROWS, RAMP)


# On an accelerator.


@pytest.mark.gpu
def test_a_capture_without_memory_is_tried_again():
    policy, expert = (tiny_model(seed).cuda() for seed in (1, 2))
    expected = draw("stepwise", RAMP, (policy, expert))
    failed = []

    def fail_once(*_):
        if torch.cuda.is_current_stream_capturing() and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("out of memory")

    policy.model.norm.register_forward_pre_hook(fail_once)
    with pytest.warns(UserWarning, match=OUT_OF_MEMORY):
        rollout = draw("stepwise", RAMP, (policy, expert))
    assert_same(rollout, expected)
    assert policy not in graphs._UNCAPTURABLE


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["stepwise", "coin", 4])
def test_on_an_accelerator(kind):
    """Caches of 510 rows with 256 tokens, each of them 4 KiB, where there are 300 MiB for both models."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    models = [tiny_model(seed, **sizes, head_dim=64, max_position_embeddings=512).cuda() for seed in (1, 2)]
    for weight in (weight for model in models for weight in model.parameters()):
        weight.data.mul_(0.05)  # of models as wide as this
    guidance, call = Guidance("constant", max_weight=0.2), {"prompts": PROMPTS * 170, "length": 256}
    torch.manual_seed(0)
    expected = guidance.sample(kind, *models, **call)
    torch.cuda.empty_cache()
    device, total = torch.cuda.current_device(), torch.cuda.get_device_properties().total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 300 * 2**20) / total, device)
    try:
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match=OUT_OF_MEMORY):
            rollout = guidance.sample(kind, *models, **call)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    is_same = [ours == theirs for ours, theirs in zip(rollout.completion_ids, expected.completion_ids, strict=True)]
    assert sum(is_same) > 0.9 * len(is_same)  # but for rounding
    assert_recorded(rollout.take([0, 1, 509]), *(model.cpu() for model in models), PROMPTS, guidance)
