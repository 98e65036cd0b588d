"""Log-probabilities of given completions are those of a plain forward of each row by itself, in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.models import AllLogits, Opaque, tiny_adapter, tiny_model
from trl_selective.experts import completion_logps, evaluation_mode, scoring

PROMPTS = [[2, 3, 4, 5, 2], [3], [5, 2, 4], [6, 6, 2, 3], [4]]
COMPLETIONS = [[3, 1], [2, 4, 6, 2, 5, 3, 1], [1], [4, 4, 4], [6, 5, 2, 2, 1]]
KINDS = ["llama", "gpt2", "sliding_and_full", "convolution", "alibi", "recurrent"]


@torch.no_grad()
def plain_logps(model, prompt: list[int], completion: list[int], temperature: float = 1.0) -> Tensor:
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0].double()
    laws = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return laws.gather(1, torch.tensor(completion)[:, None])[:, 0]


def assert_plain(logps: list[Tensor], model, prompts=PROMPTS, completions=COMPLETIONS, temperature: float = 1.0):
    expected = [plain_logps(model, *pair, temperature) for pair in zip(prompts, completions, strict=True)]
    for ours, theirs in zip(logps, expected, strict=True):
        assert ours.dtype == torch.float32
        assert not ours.requires_grad
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_rows_are_scored_as_if_alone(kind, batch_size):
    model = tiny_model(1, kind)
    assert_plain(completion_logps(model, PROMPTS, COMPLETIONS, batch_size=batch_size), model)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_divides_the_logits(temperature):
    model = tiny_model(1)
    logps = completion_logps(model, PROMPTS, COMPLETIONS, temperature=temperature)
    assert_plain(logps, model, temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_laws_sum_to_1(temperature):
    """All continuations of a prompt by two tokens: 49 completions in one ragged batch with a longer one."""
    model = tiny_model(1)
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7)).tolist()
    prompts, completions = [[3, 2]] * 49 + [[4] * 9], [*pairs, [2] * 6]
    logps = completion_logps(model, prompts, completions, temperature=temperature)
    probs = torch.stack([row.double().sum() for row in logps[:49]]).exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-5)
    assert probs.max() > 0.1  # and they are no uniform law: 1/49 = 0.02


def test_no_rows():
    assert completion_logps(tiny_model(1), [], []) == []


def test_a_completion_for_each_prompt():
    with pytest.raises(ValueError, match="shorter"):
        completion_logps(tiny_model(1), PROMPTS, COMPLETIONS[:-1])


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("wrap", [AllLogits, Opaque])
def test_models_that_take_no_logits_to_keep_or_do_not_say_what_they_take(wrap, batch_size):
    model = tiny_model(1)
    assert_plain(completion_logps(wrap(model), PROMPTS, COMPLETIONS, batch_size=batch_size), model)


def test_a_compiled_model_that_takes_less():
    model = tiny_model(1)
    compiled = torch.compile(AllLogits(model), backend="eager")
    assert_plain(completion_logps(compiled, PROMPTS, COMPLETIONS), model)


class TakesButIgnores(nn.Module):
    """Takes `logits_to_keep` and returns all logits nevertheless."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids, attention_mask=None, logits_to_keep=0):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_a_model_that_returns_all_logits_whatever_it_is_asked_for():
    model = tiny_model(1)
    assert_plain(completion_logps(TakesButIgnores(model), PROMPTS, COMPLETIONS), model)


def test_an_adapter_is_part_of_the_model():
    model = tiny_adapter(2)
    with_adapter = completion_logps(model, PROMPTS, COMPLETIONS)
    assert_plain(with_adapter, model)
    with model.disable_adapter():
        assert (completion_logps(model, PROMPTS, COMPLETIONS)[1] - with_adapter[1]).abs().max() > 0.05


def test_bfloat16_models_have_float32_laws():
    """Logits of size 2 have 8 bits; a log-probability that went through bfloat16 would be one of its few values."""
    model = tiny_model(1).bfloat16()
    logps = torch.cat(completion_logps(model, PROMPTS, COMPLETIONS))
    expected = torch.cat([plain_logps(model, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)])
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=0.1)
    assert (logps != logps.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize("positions", [1, 2, 3, 7])
def test_blocks_of_positions_change_nothing(monkeypatch, positions):
    model = tiny_model(1)
    whole = completion_logps(model, PROMPTS, COMPLETIONS)
    monkeypatch.setattr(scoring, "POSITIONS_AT_ONCE", positions)
    for ours, expected in zip(completion_logps(model, PROMPTS, COMPLETIONS), whole, strict=True):
        assert torch.equal(ours, expected)


def forwards(model) -> list[tuple]:
    """Rows, tokens and kept logits of each forward from now on."""
    calls = []

    def note(_, args, kwargs):
        calls.append((*kwargs["input_ids"].shape, kwargs.get("logits_to_keep")))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return calls


def test_no_more_logits_than_are_needed():
    model = tiny_model(1)
    calls = forwards(model)
    completion_logps(model, PROMPTS, COMPLETIONS, batch_size=2)
    # longest text of each pair, and from there back to the last token of its shortest prompt: 8 - 1 + 1, 7 - 3 + 1, 6 - 1 + 1
    assert calls == [(2, 8, 8), (2, 7, 5), (1, 6, 6)]


@pytest.mark.parametrize(("room", "sizes"), [(10**9, [5]), (2 * 8 * 7, [2, 2, 1]), (1, [1] * 5)])
def test_as_many_rows_as_there_is_room_for(monkeypatch, room, sizes):
    """Logits of a row: from the last token of the shortest prompt to the end of the longest text, 8 of 7 ids. A row that is too large goes alone."""
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", room)
    model = tiny_model(1)
    calls = forwards(model)
    logps = completion_logps(model, PROMPTS, COMPLETIONS)
    assert [rows for rows, *_ in calls] == sizes
    assert_plain(logps, model)


# ---- Mode ------------------------------------------------------------------------------------------------------------------------------


def dropping_model():
    return tiny_model(1, attention_dropout=0.5).train()


def test_the_mode_is_the_callers():
    model = dropping_model()
    score = partial(completion_logps, model, PROMPTS, COMPLETIONS)
    assert (score()[1] - score()[1]).abs().max() > 1e-3
    assert model.training
    with evaluation_mode(model):
        inside = score()
    assert_plain(inside, model.eval())


def test_evaluation_mode_restores_each_module():
    model = dropping_model()
    model.model.layers[0].eval()
    model.model.norm.eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert 1 < sum(before.values()) < len(before) - 1
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == before

    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert {name: module.training for name, module in model.named_modules()} == before


def test_evaluation_mode_of_a_model_in_evaluation_mode():
    model = tiny_model(1)
    with evaluation_mode(model):
        pass
    assert not any(module.training for module in model.modules())
