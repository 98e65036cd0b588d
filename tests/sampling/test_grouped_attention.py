"""Heads that share keys and values give what they give when keys and values are repeated for each of them."""

from contextlib import suppress

import pytest
import torch
from transformers import AttentionInterface

from tests.models import tiny_model
from trl_selective.sampling import grouped_attention as grouped_attention_module
from trl_selective.sampling.grouped_attention import grouped_attention

ROWS, SHARED, COLUMNS, SIZE = 2, 2, 7, 4


def states(heads: int, length: int) -> torch.Tensor:
    return torch.randn(ROWS, heads, length, SIZE, dtype=torch.float64)


def masks(width: int) -> dict[str, torch.Tensor]:
    is_seen = torch.rand(ROWS, 1, width, COLUMNS) < 0.6
    is_seen[..., 0] = True
    bias = torch.zeros(is_seen.shape, dtype=torch.float64).masked_fill(~is_seen, -torch.inf)
    return {"bool": is_seen, "additive": bias + torch.randn(is_seen.shape)}


def attend(width: int, group: int, mask: torch.Tensor | None, **options) -> torch.Tensor:
    torch.manual_seed(group)
    query, key, value = states(SHARED * group, width), states(SHARED, COLUMNS), states(SHARED, COLUMNS)
    module = torch.nn.Module()
    module.num_key_value_groups = group
    output, _ = AttentionInterface()["sdpa"](module, query, key, value, mask, scaling=0.3, **options)
    return output


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 4])
def test_the_output_is_that_of_repeated_keys_and_values(width, group, kind):
    mask = masks(width)[kind]
    expected = attend(width, group, mask)
    with grouped_attention():
        output = attend(width, group, mask)
    assert output.shape == (ROWS, width, SHARED * group, SIZE)
    assert output.is_contiguous()
    assert output.sub(expected).abs().max() < 1e-12


def test_dropout_is_passed_on():
    with grouped_attention():
        assert not attend(3, 2, masks(3)["bool"], dropout=1.0).any()


@pytest.fixture
def usual_calls():
    """What the usual function, a stand-in, was called with."""
    calls = []

    def usual(module, query, key, value, mask, **options):
        calls.append((query, key, value, mask, options))
        return query.transpose(1, 2), None

    before = AttentionInterface()["sdpa"]
    AttentionInterface.register("sdpa", usual)
    yield calls
    AttentionInterface.register("sdpa", before)


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (None, {}),
        (torch.ones(ROWS, 4, 3, COLUMNS, dtype=torch.bool), {}),  # of each head its own
        (masks(3)["bool"], {"position_bias": torch.randn(1, 4, 3, COLUMNS, dtype=torch.float64)}),
        (masks(3)["bool"], {"softcap": 30.0}),
    ],
)
def test_what_it_does_not_know_it_leaves_to_the_usual_function(mask, options, usual_calls):
    with grouped_attention():
        attend(3, 2, mask, **options)
    query, key, value, passed, given = usual_calls[0]
    assert (query.shape[1], key.shape[1], value.shape[1]) == (4, 2, 2)
    assert passed is mask
    assert given == {"dropout": 0.0, "scaling": 0.3, **options}


def test_a_model_attends_to_the_cache_as_it_is(monkeypatch):
    shapes, masks = [], []
    usual = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        grouped_attention_module,
        "scaled_dot_product_attention",
        lambda query, key, value, mask, **options: (
            shapes.append((query.shape, key.shape)) or masks.append(mask) or usual(query, key, value, mask, **options)
        ),
    )
    model = tiny_model(1, num_attention_heads=4, num_key_value_heads=2)
    ids = torch.tensor([[2, 3, 4, 5, 2]])
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    expected = model(ids, attention_mask=mask).logits
    assert not shapes
    with grouped_attention():
        logits = model(ids, attention_mask=mask).logits
    assert shapes == [((1, 2, 10, 8), (1, 2, 5, 8))] * model.config.num_hidden_layers
    assert len(masks) > len(set(map(id, masks))) == 1  # made once for all layers
    assert masks[0].dtype == logits.dtype
    assert logits.sub(expected).abs().max() < 1e-5


def test_afterwards_all_is_as_it_was():
    usual = AttentionInterface()["sdpa"]
    with suppress(KeyError), grouped_attention():
        assert AttentionInterface()["sdpa"] is not usual
        raise KeyError
    assert AttentionInterface()["sdpa"] is usual
