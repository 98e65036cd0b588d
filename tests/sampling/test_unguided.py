"""A model by itself draws from its full law; with numbers of its own, a row draws the same in any company."""

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from tests.models import tiny_adapter, tiny_model
from tests.training import EXPERT
from trl_selective.sampling.unguided import encode_prompt, end_token_ids, sample_completions

PROMPTS = [[2, 3, 4], [5], [6, 6]]


def sample(model, prompt_ids, *, length=1, temperature=1.0, top_p=1.0, ends=(1,), uniforms=None):
    return sample_completions(
        model,
        prompt_ids,
        max_completion_length=length,
        eos_token_ids=ends,
        pad_token_id=0,
        temperature=temperature,
        top_p=top_p,
        uniforms=uniforms,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_evenly_spaced_numbers_give_every_token_its_share(temperature):
    """The number of n evenly spaced numbers that fall into a slice of length p differs from n p by less than 1."""
    model, n = tiny_model(3), 500
    uniforms = (torch.arange(n, dtype=torch.float64).unsqueeze(1) + 0.5) / n
    drawn = torch.tensor(sample(model, [PROMPTS[0]] * n, temperature=temperature, uniforms=uniforms)).flatten()
    law = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature).softmax(-1)
    assert (drawn.bincount(minlength=7) - n * law).abs().max() < 1 + 1e-3


@pytest.mark.parametrize("has_uniforms", [False, True])
def test_top_p_leaves_the_likeliest_tokens(has_uniforms):
    """Those that have 0.8 together, each with its share of them: with n evenly spaced numbers to less than 1, else within 5 standard deviations."""
    model, n = tiny_model(3), 2000
    with torch.no_grad():
        probs = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double().softmax(-1)
    ordered, tokens = probs.sort(descending=True)
    kept = tokens[(ordered.cumsum(0) - ordered) < 0.8]
    assert 1 < len(kept) < len(tokens)
    uniforms = (torch.arange(n, dtype=torch.float64).unsqueeze(1) + 0.5) / n if has_uniforms else None
    drawn = torch.tensor(sample(model, [PROMPTS[0]] * n, top_p=0.8, uniforms=uniforms)).squeeze(1)
    assert set(drawn.tolist()) == set(kept.tolist())
    expected = n * probs[kept] / probs[kept].sum()
    error = (drawn.bincount(minlength=len(probs))[kept] - expected).abs()
    assert (error < (1.01 if has_uniforms else 5 * expected.sqrt())).all()


@pytest.mark.parametrize("has_uniforms", [False, True])
def test_at_temperature_0_the_most_likely_token_is_taken(has_uniforms):
    model = tiny_model(3)
    uniforms = torch.rand(3, 5, dtype=torch.float64) if has_uniforms else None
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert sample(model, PROMPTS, length=5, ends=(), temperature=0.0, uniforms=uniforms) == expected


def test_a_row_draws_the_same_in_any_company():
    model = tiny_model(4)
    uniforms = torch.rand(3, 12, dtype=torch.float64)
    together = sample(model, PROMPTS, length=12, uniforms=uniforms)
    alone = [sample(model, [PROMPTS[row]], length=12, uniforms=uniforms[[row]])[0] for row in range(3)]
    assert alone == together
    assert sample(model, PROMPTS, length=12, uniforms=uniforms.flip(0)) != together


@pytest.mark.parametrize("has_uniforms", [False, True])
def test_a_completion_ends_with_its_first_end_token(has_uniforms):
    uniforms = torch.rand(50, 8, dtype=torch.float64) if has_uniforms else None
    rows = sample(tiny_model(5), [PROMPTS[1]] * 50, length=8, ends=(1, 4), uniforms=uniforms)
    ended = [row for row in rows if {1, 4} & set(row)]
    assert len({len(row) for row in ended}) > 1
    assert all(not {1, 4} & set(row[:-1]) for row in rows)
    assert all(len(row) == 8 for row in rows if row not in ended)


@pytest.mark.parametrize("has_uniforms", [False, True])
@pytest.mark.parametrize("make_model", [tiny_model, tiny_adapter])
def test_the_models_own_settings_do_not_count(make_model, has_uniforms):
    model = make_model(6)
    uniforms = torch.rand(3, 8, dtype=torch.float64) if has_uniforms else None
    torch.manual_seed(1)
    plain = sample(model, PROMPTS, length=8, uniforms=uniforms)
    own = GenerationConfig(repetition_penalty=1.8, suppress_tokens=[2, 3], top_k=1, do_sample=True)
    model.generation_config = own
    torch.manual_seed(1)
    assert sample(model, PROMPTS, length=8, uniforms=uniforms) == plain
    assert model.generation_config is own


def test_conversations_are_encoded_up_to_the_answer():
    tokenizer = AutoTokenizer.from_pretrained(EXPERT)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} :{% endif %}"
    )
    conversation = [{"role": "user", "content": "7 > 11"}]
    assert (
        encode_prompt(tokenizer, conversation)
        == encode_prompt(tokenizer, "7 > 11 :")
        == tokenizer("7 > 11 :").input_ids
    )


def test_a_chat_template_gets_its_arguments():
    tokenizer = AutoTokenizer.from_pretrained(EXPERT)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ end or ' :' }}"
    conversation = [{"role": "user", "content": "7 > 11"}]
    assert encode_prompt(tokenizer, conversation, {"end": " >"}) == tokenizer("7 > 11 >").input_ids
    other = {"chat_template": "{{ messages[0]['content'] }} ~", "tokenize": True}
    assert encode_prompt(tokenizer, conversation, other) == tokenizer("7 > 11 ~").input_ids


@pytest.mark.parametrize(("own", "ends"), [(None, [1]), (3, [1, 3]), ([3, 1], [1, 3])])
def test_ends_are_the_models_and_the_tokenizers(own, ends):
    model = tiny_model(1)
    model.generation_config.eos_token_id = own
    assert end_token_ids(model.generation_config, AutoTokenizer.from_pretrained(EXPERT)) == ends
