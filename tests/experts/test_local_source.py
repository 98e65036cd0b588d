"""A model in this process: what it draws, what it says about it, and what a policy reads."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.training import EXPERT, path_dataset
from trl_selective.experts import LocalSource, Sampling, load_expert, local_source
from trl_selective.sampling.unguided import sample_completions

SAMPLING = Sampling(num_completions=3, max_completion_length=26, temperature=1.5, seed=3)
PROMPTS = path_dataset(7)["prompt"][:]
# The template writes the words alone, so that a conversation is the plain prompt, and ends answers as the policy does.
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %} {% endfor %}"


@pytest.fixture(scope="module")
def expert():
    return load_expert(EXPERT, torch.device("cpu"))


def tokenizer_with(**changes):
    tokenizer = AutoTokenizer.from_pretrained(EXPERT)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def source_of(expert, sampling=SAMPLING, *, tokenizer=None, policy_tokenizer=None, batch_size=32):
    tokenizer = tokenizer or tokenizer_with()
    return LocalSource(expert, tokenizer, "expert", sampling, policy_tokenizer or tokenizer, batch_size)


def complete(source, prompts=PROMPTS, first=0):
    return list(source.complete(prompts, first))


def as_chat(prompts):
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def test_logps_are_those_of_a_fresh_forward(expert):
    tokenizer = tokenizer_with()
    for prompt, completions in zip(PROMPTS, complete(source_of(expert)), strict=True):
        for completion in completions:
            if not completion.is_whole:
                continue
            prompt_ids, ids = tokenizer(prompt).input_ids, tokenizer(f"{completion.text} <eos>").input_ids
            logits = expert(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
            expected = (logits / 1.5).log_softmax(-1).gather(-1, torch.tensor(ids).unsqueeze(-1)).squeeze(-1)
            assert completion.token_ids == ids
            assert completion.logps == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_batch_size_changes_nothing(expert):
    together = complete(source_of(expert, batch_size=100))
    for batch_size in (1, 6):
        for row, other in zip(together, complete(source_of(expert, batch_size=batch_size)), strict=True):
            assert [each.text for each in row] == [each.text for each in other]
    assert len({each.text for each in together[0]}) > 1  # another draw for every completion


def test_seeds_and_rows_draw_differently(expert):
    again = source_of(expert, replace(SAMPLING, seed=4))
    texts = [[[each.text for each in row] for row in complete(s)] for s in (source_of(expert), again)]
    assert texts[0] != texts[1]
    same = complete(source_of(expert), [PROMPTS[0]] * 2)
    assert [each.text for each in same[0]] != [each.text for each in same[1]]


@pytest.mark.parametrize(("first", "num_batches"), [(1, 3), (4, 2), (6, 1), (7, 0)])
def test_it_goes_on_within_a_batch_to_the_last_digit(expert, monkeypatch, first, num_batches):
    """By forwards over the same rows: with others beside them, the last digits may differ."""
    batches = []

    def sample(model, prompt_ids, **settings):
        batches.append(prompt_ids)
        return sample_completions(model, prompt_ids, **settings)

    monkeypatch.setattr(local_source, "sample_completions", sample)
    source = source_of(expert, batch_size=9)  # 3 rows, 3 rows, 1 row
    expected, whole_run = complete(source), batches.copy()
    batches.clear()
    assert complete(source, first=first) == expected[first:]
    assert batches == whole_run[3 - num_batches :]


def test_what_is_cut_off_or_empty_is_not_whole(expert):
    cut = complete(source_of(expert, replace(SAMPLING, max_completion_length=4)))
    assert all((each.text, each.is_whole, each.logps) == ("", False, None) for row in cut for each in row)
    source = source_of(expert)
    assert source._text([3, 1]) == "1"
    for ids in ([3, 3], [1], [0, 1]):  # no end; an end alone; padding alone, which no reader takes
        assert source._text(ids) is None


def test_what_the_policy_reads_as_empty_is_no_answer(expert):
    """The end token of this policy is a word of the expert, with which some of its answers begin."""
    known = complete(source_of(expert))
    answers = complete(source_of(expert, policy_tokenizer=tokenizer_with(eos_token="~")))
    begins_with_end = [e.is_whole and e.text.startswith("~") for row in known for e in row]
    assert any(begins_with_end)
    assert not all(begins_with_end)
    for before, after, is_empty in zip(chain(*known), chain(*answers), begins_with_end, strict=True):
        assert after.is_whole == (before.is_whole and not is_empty)
        assert (after.text, after.logps) == (before.text, None)
    source = source_of(expert, policy_tokenizer=tokenizer_with(eos_token="~"))
    for text in ("~ 1", "~", "~ ~ <pad>"):  # words behind the end; nothing but special tokens of the policy
        assert source._read_back(PROMPTS[0], text, "Row 0") is None


def test_an_answer_that_is_longer_for_the_policy_is_kept(expert):
    """A policy that reads each blank and each character by itself, as one with a smaller vocabulary would."""
    characters = Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    characters.pre_tokenizer = Split(Regex("."), "isolated")
    policy_tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>", unk_token="<unk>")
    known = complete(source_of(expert))
    assert any(e.is_whole and len(policy_tokenizer(e.text).input_ids) > 26 for row in known for e in row)
    for row, other in zip(known, complete(source_of(expert, policy_tokenizer=policy_tokenizer)), strict=True):
        assert [(e.text, e.is_whole) for e in other] == [(e.text, e.is_whole) for e in row]
        assert not any(e.logps for e in other)


def test_a_policy_that_reads_other_tokens_has_no_logps(expert):
    """One that ends otherwise; one that has another id for the filler; and one with the same ids but for words not used."""
    known = complete(source_of(expert))
    ends_otherwise = complete(source_of(expert, policy_tokenizer=tokenizer_with(eos_token=">")))
    assert all(each.logps is None for row in ends_otherwise for each in row)
    assert [[e.text for e in row] for row in ends_otherwise] == [[e.text for e in row] for row in known]

    vocabulary = tokenizer_with().get_vocab()
    swapped = tokenizer_with()
    words = {"~": vocabulary[">"], ">": vocabulary["~"]}
    swapped.backend_tokenizer.model = type(swapped.backend_tokenizer.model)(
        vocab={**vocabulary, **words}, unk_token="<pad>"
    )
    for row, other in zip(known, complete(source_of(expert, policy_tokenizer=swapped)), strict=True):
        for each, same in zip(row, other, strict=True):
            is_same = each.is_whole and "~" not in each.text and ">" not in each.text
            assert (same.logps is not None) == is_same
            if is_same:
                assert same.logps == pytest.approx(each.logps, abs=1e-5)
    assert any("~" in each.text for row in known for each in row)


def test_a_conversation_is_the_plain_prompt(expert):
    tokenizer = tokenizer_with(chat_template=TEMPLATE)
    plain, chat = complete(source_of(expert)), complete(source_of(expert, tokenizer=tokenizer), as_chat(PROMPTS))
    assert chat == plain
    assert any(each.logps for row in chat for each in row)


def test_a_template_that_leaves_words_out_is_refused(expert):
    """As some leave out thoughts: such answers could not be trained on."""
    changing = TEMPLATE.replace(
        "{{ m['content'] }}", "{{ m['content'].split(' ', 1)[1] if m['role'] == 'assistant' else m['content'] }}"
    )
    policy_tokenizer = tokenizer_with(chat_template=changing)
    source = source_of(expert, tokenizer=tokenizer_with(chat_template=TEMPLATE), policy_tokenizer=policy_tokenizer)
    with pytest.raises(ValueError, match=r"the chat template shows only .* use prompts that are texts"):
        complete(source, as_chat(PROMPTS))


def test_a_template_that_cannot_show_an_answer_is_refused(expert):
    hiding = tokenizer_with(chat_template="{{ messages[-1]['content'] }}")
    source = source_of(expert, tokenizer=tokenizer_with(chat_template=TEMPLATE), policy_tokenizer=hiding)
    message = "Row 0, completion 0: the chat template shows .* use prompts that are texts, or the tokenizer of another policy"
    with pytest.raises(ValueError, match=message):
        complete(source, as_chat(PROMPTS))


def test_an_expert_without_an_end_is_refused(expert, monkeypatch):
    monkeypatch.setattr(expert.generation_config, "eos_token_id", None)
    with pytest.raises(ValueError, match=r"The expert 'expert' has no end token.* Set `eos_token` of its tokenizer"):
        source_of(expert, tokenizer=tokenizer_with(eos_token=None))


@pytest.mark.parametrize("change", [{"num_completions": 0}, {"max_completion_length": 0}, {"temperature": 0.0}])
def test_sampling_that_cannot_be(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name} must be (at least 1|above 0), got {value}"):
        replace(SAMPLING, **change)
