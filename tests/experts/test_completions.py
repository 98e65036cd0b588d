"""What a dataset's column of expert completions becomes, and what is refused with the row's name."""

import re
import warnings

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from tests.training import POLICY
from trl_selective.experts import CompletionReader, ExpertCompletion

NAN, INF = float("nan"), float("inf")
BLANK = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's
PROMPT = "2 7 > 9 :"
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The policy continues after an opened thought; a conversation shows whatever was answered.
OPENS_A_THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# A conversation shows answers without their thoughts.
DROPS_THOUGHTS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
# Ends no message: the reader has to.
WITHOUT_END = CHATML.replace("<|im_end|>\n", "\n")


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """The quickstart's: words between blanks, <pad> 0, <eos> 1, and the cell n is n + 2."""
    return AutoTokenizer.from_pretrained(POLICY)


@pytest.fixture(scope="module")
def chat() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["assistant\nThe answer is 4. What is 2 + 2? Let me think.\n"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def make_reader(tokenizer, template: str | None = None, **changes) -> CompletionReader:
    settings = {
        "eos_token_ids": [tokenizer.eos_token_id],
        "max_completion_length": 100,
        "completions_column": "expert",
        "logprobs_column": "logps",
        "sources_column": "sources",
        "overlong": "drop",
        "needs_logps": False,
        "render": lambda messages, add_generation_prompt: tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
        ),
    }
    return CompletionReader(tokenizer, **{**settings, **changes})


def row_of(expert, prompt=PROMPT, logps=None, sources=None) -> dict:
    return {"prompt": prompt, "expert": expert, "logps": logps, "sources": sources}


def assistant(content) -> list[dict]:
    return [{"role": "assistant", "content": content}]


def token_ids(completions: list[ExpertCompletion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


# ---- Texts -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ([], []),
        ("0 1", [(2, 3, 1)]),
        (["0 1"], [(2, 3, 1)]),
        (("0 1",), [(2, 3, 1)]),
        (["3", "0 1", "3"], [(5, 1), (2, 3, 1), (5, 1)]),
        (["0 1 <eos>"], [(2, 3, 1)]),
        (["0 1<eos>\n"], [(2, 3, 1)]),
        (["0 <eos> 1", "0 <eos> <eos>"], [(2, 1), (2, 1)]),
    ],
    ids=[
        "none",
        "empty",
        "single",
        "one",
        "tuple",
        "several",
        "with_end",
        "end_and_blank",
        "cut_behind_the_first_end",
    ],
)
def test_texts_become_tokens_with_one_end(words, value, expected):
    reader = make_reader(words)
    assert token_ids(reader.read(row_of(value))) == expected
    assert (reader.num_read, reader.num_overlong) == (len(expected), 0)


def test_any_end_of_the_policy_ends_a_text_and_the_first_one_is_appended(words):
    reader = make_reader(words, eos_token_ids=[9, 1])  # the cell 7, and <eos>
    assert token_ids(reader.read(row_of(["0 7 1", "0 <eos> 7", "0 1"]))) == [(2, 9), (2, 1), (2, 3, 9)]


def test_no_token_is_added_in_front():
    """A tokenizer that begins every text with a token of its own does so for prompts only."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.add_bos_token = True
    assert tokenizer("0 1")["input_ids"][0] == tokenizer.bos_token_id
    assert token_ids(make_reader(tokenizer).read(row_of("0 1"))) == [(2, 3, 1)]


@pytest.mark.parametrize(
    ("overlong", "expected"), [("drop", [(2, 3, 1)]), ("truncate", [(2, 3, 4), (2, 3, 1), (5, 6, 7)])]
)
def test_overlong_completions_are_counted(words, overlong, expected):
    reader = make_reader(words, max_completion_length=3, overlong=overlong)
    found = reader.read(row_of(["0 1 2 3", "0 1", "3 4 5"]))  # 5, 3 and 4 tokens with the end
    assert token_ids(found) == expected
    assert (reader.num_read, reader.num_overlong) == (3, 2)
    reader.read(row_of(["0 1 2 3"]))
    assert (reader.num_read, reader.num_overlong) == (4, 3)


def test_log_probabilities_and_sources_stay_with_their_completion(words):
    logps = [[-1.0, -2.0, -3.0, -4.0], [-0.5, 0.0], None]
    row = row_of(["0 1 2", "3", "4"], logps=logps, sources=["a", None, "c"])
    dropped = make_reader(words, max_completion_length=2).read(row)
    assert dropped == [ExpertCompletion((5, 1), (-0.5, 0.0), None), ExpertCompletion((6, 1), None, "c")]
    cut = make_reader(words, max_completion_length=2, overlong="truncate").read(row)
    assert cut == [ExpertCompletion((2, 3), (-1.0, -2.0), "a"), *dropped]


def test_a_single_completion_has_single_values(words):
    expected = [ExpertCompletion((2, 1), (-1.0, -0.25), "a")]
    for row in (row_of("0", logps=[-1.0, -0.25], sources="a"), row_of(["0"], logps=[[-1, -0.25]], sources=["a"])):
        assert make_reader(words).read(row) == expected


def test_columns_that_are_not_set_are_not_looked_at(words):
    reader = make_reader(words, logprobs_column=None, sources_column=None)
    assert reader.columns == ["expert"]
    assert make_reader(words).columns == ["expert", "logps", "sources"]
    assert reader.read({"prompt": PROMPT, "expert": "0", "logps": "nonsense", "sources": 3}) == [
        ExpertCompletion((2, 1))
    ]


def test_rounding_may_put_a_log_probability_above_0(words):
    assert make_reader(words).read(row_of("0", logps=[1e-7, 0.0]))[0].logps == (1e-7, 0.0)


def test_a_key_names_the_text_alone():
    key = ExpertCompletion((2, 3, 1)).key
    # sha256 of "(2, 3, 1)": the same in every process, whatever PYTHONHASHSEED
    assert key == "732b5bb2b29c30ea"
    assert ExpertCompletion((2, 3, 1), (-1.0, -1.0, -1.0), "a").key == key
    assert ExpertCompletion((2, 31)).key != key


def test_rows_read_together_are_those_read_one_by_one(words):
    rows = [
        row_of(["0 1", "2 3 4 5"], sources=["a", "b"]),
        row_of(None),
        row_of([]),
        row_of("6 7", logps=[-1.0, -2.0, -3.0]),
    ]
    together, one_by_one = (make_reader(words, max_completion_length=4) for _ in range(2))
    assert together.read_all(rows) == [one_by_one.read(row) for row in rows]
    assert (together.num_read, together.num_overlong) == (one_by_one.num_read, one_by_one.num_overlong) == (3, 1)
    assert together.read_all([]) == []
    with pytest.raises(ValueError, match=r"^The row with the prompt 'x', completion 0 in 'expert' is ''"):
        together.read_all([*rows, row_of("", prompt="x")])


# ---- Conversations ---------------------------------------------------------------------------------------------------------------------


def behind_the_prompt(tokenizer, template, prompt, completion) -> list[int]:
    """Tokens of the whole conversation, less those of the prompt as the policy gets it."""
    options = {"chat_template": template, "tokenize": True, "return_dict": False}
    prefix = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template([*prompt, *completion], **options)
    assert whole[: len(prefix)] == prefix
    return whole[len(prefix) :]


@pytest.mark.parametrize("answer", ["The answer is 4.", "4", "The answer\n\nis  4.\n", " 4", "vier \u2192 \u0664"])
def test_a_conversation_is_tokenised_as_the_chat_template_shows_it(chat, answer):
    reader = make_reader(chat)
    found = token_ids(reader.read(row_of([assistant(answer)], prompt=QUESTION)))
    whole = behind_the_prompt(chat, CHATML, QUESTION, assistant(answer))
    end = whole.index(chat.eos_token_id)
    assert found == [tuple(whole[: end + 1])]
    assert chat.decode(whole[end + 1 :]) == "\n"  # the template's line break behind the end is not part of an answer
    assert chat.decode(found[0]) == f"{answer}<|im_end|>"
    assert found == token_ids(reader.read(row_of(f"{answer}<|im_end|>", prompt=QUESTION)))
    assert found == token_ids(reader.read(row_of(answer, prompt=QUESTION)))  # the end is appended


def test_conversations_alone_or_several(chat):
    reader = make_reader(chat)
    single, several = assistant("4"), [assistant("4"), assistant("The answer")]
    assert [chat.decode(ids) for ids in token_ids(reader.read(row_of(single, prompt=QUESTION)))] == ["4<|im_end|>"]
    found = reader.read(row_of(several, prompt=QUESTION, sources=["a", "b"]))
    assert [(chat.decode(c.token_ids), c.source) for c in found] == [
        ("4<|im_end|>", "a"),
        ("The answer<|im_end|>", "b"),
    ]


def test_a_template_that_ends_no_message(chat):
    found = token_ids(make_reader(chat, WITHOUT_END).read(row_of(assistant("4"), prompt=QUESTION)))
    assert chat.decode(found[0]) == "4\n<|im_end|>"


@pytest.fixture(scope="module")
def pieces() -> LlamaTokenizer:
    """As Llama 2, Mistral and TinyLlama have it: a blank is put before the first word of what is read."""
    words = [f"{BLANK}{word}" for word in ("The", "answer", "is", "4", "2", "+", "[/INST]")]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = []
    for word in [*words, "The", "assistant"]:
        vocabulary += word
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            vocabulary.append(word[: end + 1])
    vocab = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    return LlamaTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)))


LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)
ZEPHYR = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"


@pytest.mark.parametrize("template", [LLAMA_2, ZEPHYR], ids=["llama_2", "zephyr"])
def test_an_answer_has_the_tokens_that_it_has_in_its_conversation(pieces, template):
    reader = make_reader(pieces, template)
    messages = [*QUESTION, *assistant("The answer is 4")]
    shown = [reader.render(messages[:-1], True), reader.render(messages, False)]
    prompt_ids, ids = pieces(text=shown, add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids
    (found,) = reader.read(row_of([messages[-1:]], prompt=QUESTION))
    assert [*prompt_ids, *found.token_ids] == ids[: len(prompt_ids) + len(found.token_ids)]
    assert found.token_ids[-1] == pieces.eos_token_id
    is_blank_before = pieces.convert_ids_to_tokens(found.token_ids[0]).startswith(BLANK)
    assert is_blank_before is (template == LLAMA_2)


@pytest.mark.parametrize("prompt", ["2 + 2\n", "2 + 2 is ", "2 + 2: Th"], ids=["new_line", "blank", "within_a_word"])
def test_no_blank_comes_between_a_text_and_its_prompt(pieces, prompt):
    """Also where the last letters of the prompt would merge with the first ones of the answer."""
    (found,) = make_reader(pieces).read(row_of(["The answer"], prompt=prompt))
    ids = [*pieces(prompt)["input_ids"], *found.token_ids]
    assert pieces.decode(ids, skip_special_tokens=True) == f"{prompt}The answer"


@pytest.mark.parametrize("eos_token_id", [0, 2])
def test_two_ends_are_warned_of(chat, eos_token_id):
    """A base model whose end token is not that of its chat template."""
    reader = make_reader(chat, eos_token_ids=[eos_token_id])
    rows = [row_of([assistant("It is 4.")], prompt=QUESTION)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        reader.check(rows)
    expected = "end with '<|im_end|>', which ends no rollout of the policy, so that its end token '<|endoftext|>' is put behind it"
    assert [expected in str(each.message) for each in said] == [True] * (eos_token_id == 0)


def test_an_answer_that_goes_on_with_the_opened_thought(chat):
    """The prompt ends in `<think>`: what follows it is what is learnt."""
    answer = "<think>\nLet me think.</think>4"
    found = token_ids(make_reader(chat, OPENS_A_THOUGHT).read(row_of(assistant(answer), prompt=QUESTION)))
    assert chat.decode(found[0]) == "Let me think.</think>4<|im_end|>"


# ---- What is refused -------------------------------------------------------------------------------------------------------------------

LONG = "0 " * 100
KIND = "expected a list of texts or of conversations, which may be empty, or None"
TEXT = "expected a text or a conversation"
NO_TEXT = "which has no text: there is nothing to learn from it. Leave it out."
MESSAGE = "expected one message with the role 'assistant' and a text as its content"
NUMBER = "expected a finite number of at most 0. Use None for the whole completion"
TOKENS = "tokens under the policy's tokenizer, the end token included. Use None where they are not known."

BAD_TEXTS = {
    "float": ({"expert": 1.5}, rf"has 1.5 of type float in 'expert', {KIND}"),
    "bool": ({"expert": False}, rf"has False of type bool in 'expert', {KIND}"),
    "set": ({"expert": {"0"}}, rf"has {{'0'}} of type set in 'expert', {KIND}"),
    "bytes": ({"expert": b"0"}, rf"completion 0 in 'expert' is 48 of type int, {TEXT}"),
    "empty_list_inside": ({"expert": ["0", []]}, rf"completion 1 in 'expert' is \[\] of type list, {TEXT}"),
    "empty_text": ({"expert": ""}, f"completion 0 in 'expert' is '', {NO_TEXT}"),
    "blanks": ({"expert": " \n\t"}, f"{NO_TEXT}"),
    "special_tokens": ({"expert": "<eos>"}, f"completion 0 in 'expert' is '<eos>', {NO_TEXT}"),
    "mixed": ({"expert": ["0", assistant("1")], "prompt": QUESTION}, "has texts and conversations in 'expert', expected one kind"),
    "a_long_one_is_shown_in_part": ({"expert": [[LONG]]}, rf"is \['{LONG[:58]}\.\.\. of type list, {TEXT}"),
    "logps_empty": ({"logps": [[]]}, "has 0 log-probabilities in 'logps', expected one for each of its 3 tokens"),
    "logps_inf": ({"logps": [[-1.0, -1.0, INF]]}, f"has the log-probability inf at token 2 in 'logps', {NUMBER}"),
    "logps_bool": ({"logps": [[-1.0, False, -1.0]]}, f"has the log-probability False at token 1 in 'logps', {NUMBER}"),
    "logps_text_inside": ({"logps": [["-1.0", -1.0, -1.0]]}, f"has the log-probability '-1.0' at token 0 in 'logps', {NUMBER}"),
    "logps_one_number": ({"logps": -1.0}, "has -1.0 in 'logps', expected one for each of its 1 completions"),
    "logps_one_number_inside": (
        {"expert": ["0", "1"], "logps": [[-1.0, -1.0], -2.0]},
        "completion 1 has -2.0 in 'logps', expected one for each of its 2 tokens",
    ),
    "logps_of_one_completion_for_two": (
        {"expert": ["0", "1"], "logps": [-1.0, -1.0]},
        "has 1 entries in 'logps', expected one for each of its 2 completions",
    ),
    "too_few_lists": (
        {"expert": ["0", "1"], "logps": [[-1.0, -1.0]]},
        "has 1 entries in 'logps', expected one for each of its 2 completions",
    ),
    "lists_for_no_completion": ({"expert": [], "logps": [[-1.0]]}, "has 1 entries in 'logps', expected one for each of its 0 completions"),
    "logps_text": ({"logps": "abc"}, f"has the log-probability 'a' at token 0 in 'logps', {NUMBER}"),
    "one_source_for_two": (
        {"expert": ["0", "1"], "sources": "ab"},
        "has 1 entries in 'sources', expected one for each of its 2 completions",
    ),
    "source_no_list": ({"sources": 3}, "has 3 in 'sources', expected one for each of its 1 completions"),
    "source_number": (
        {"expert": ["0", "1"], "sources": ["a", 3]},
        "completion 1 has the source 3 in 'sources', expected a name or None",
    ),
    "source_list": (
        {"expert": ["0", "1"], "sources": ["a", ["b"]]},
        r"completion 1 has the source \['b'\] in 'sources', expected a name or None",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_a_malformed_row_is_refused(words, fields, message):
    row = {**row_of("0 1"), **fields}
    with pytest.raises(ValueError, match=message) as error:
        make_reader(words).read(row)
    prompt = "[{" if isinstance(row["prompt"], list) else repr(PROMPT)
    assert str(error.value).startswith(f"The row with the prompt {prompt}")
    # Before training, the row is named by its place, wherever it is.
    unset = [name for name in ("logps", "sources") if fields.get(name) is None]
    for changes in ({}, {f"{name.replace('logps', 'logprobs')}_column": None for name in unset}):
        with pytest.raises(ValueError, match=message) as error:
            make_reader(words, **changes).check([row_of("0 1"), row_of(None), row, row_of(3)])
        assert str(error.value).startswith("Row 2")


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ([{"role": "user", "content": "4"}], rf"is \[{{'role': 'user', 'content': '4'}}\], {MESSAGE}"),
        ([{"content": "4"}], MESSAGE),
        ([*assistant("4"), *assistant("5")], MESSAGE),
        ([{"role": "user", "content": "4"}, *assistant("5")], MESSAGE),
        (assistant(None), MESSAGE),
        (assistant(4), MESSAGE),
        (assistant([{"type": "text", "text": "4"}]), MESSAGE),
        ([{"role": "assistant"}], MESSAGE),
        ([{}], MESSAGE),
        (assistant(""), NO_TEXT),
        (assistant(" \n"), NO_TEXT),
        (assistant("<|im_end|>"), NO_TEXT),
        ([*assistant("4"), "5"], rf"is {{'role': 'assistant', 'content': '4'}} of type dict, {TEXT}"),
        ([*assistant("4"), None], rf"of type dict, {TEXT}"),
    ],
    ids=[
        "wrong_role",
        "no_role",
        "two_answers",
        "a_turn_too_many",
        "none",
        "number",
        "parts",
        "no_content",
        "empty_message",
        "empty",
        "blanks",
        "special_tokens",
        "message_and_text",
        "message_and_none",
    ],
)
def test_a_malformed_conversation_is_refused(chat, completion, message):
    good = row_of([assistant("4")], prompt=QUESTION)
    for value in (completion, [completion]):  # alone, and as one of several
        if "of type dict" in message and value is not completion:
            continue
        with pytest.raises(ValueError, match=f"^Row 1, completion 0 in 'expert'.*{message}"):
            make_reader(chat).check([good, row_of(value, prompt=QUESTION)])


def test_a_template_that_shows_the_prompt_otherwise_before_an_answer(chat):
    reader = make_reader(chat, OPENS_A_THOUGHT)
    row = row_of([assistant("The answer is 4.")], prompt=QUESTION)
    message = (
        r"Row 0, completion 0: the chat template shows the prompt as '.*<\|im_start\|>assistant\\n<think>\\n' before an answer, but a "
        r"conversation with this answer does not begin so. Give the completion as a text: .* such as '.*The answer is 4.<\|im_end\|>\\n'"
    )
    with pytest.raises(ValueError, match=message):
        reader.check([row])
    text = "I add.</think>The answer is 4."
    assert chat.decode(reader.read(row_of(text, prompt=QUESTION))[0].token_ids) == f"{text}<|im_end|>"


def test_a_template_that_leaves_thoughts_out(chat):
    reader = make_reader(chat, DROPS_THOUGHTS)
    answer = "<think>Let me think.</think>4"
    message = (
        r"Row 0, completion 0: the chat template shows only '4<\|im_end\|>\\n' of '<think>Let me think.</think>4'; some templates leave "
        "thoughts out. Give the completion as a text"
    )
    with pytest.raises(ValueError, match=message):
        reader.check([row_of(assistant(answer), prompt=QUESTION)])
    assert chat.decode(reader.read(row_of(answer, prompt=QUESTION))[0].token_ids) == f"{answer}<|im_end|>"
    assert chat.decode(reader.read(row_of(assistant("4"), prompt=QUESTION))[0].token_ids) == "4<|im_end|>"


def test_every_conversation_is_rendered_before_training(chat):
    """What a template leaves out depends on the answer: the first row shows nothing of the second."""
    rows = [row_of(assistant(answer), prompt=QUESTION) for answer in ("4", "<think>Let me think.</think>4")]
    with pytest.raises(ValueError, match=r"^Row 1, completion 0: the chat template shows only '4"):
        make_reader(chat, DROPS_THOUGHTS, logprobs_column=None).check(rows)


def test_log_probabilities_that_are_needed(words):
    reader = make_reader(words, needs_logps=True)
    reader.check([row_of(None), row_of([]), row_of("0", logps=[-1.0, -1.0])])
    message = (
        "Row 1, completion 1 has no log-probabilities in 'logps', which injection_correction weighs it by. Give them, leave the "
        "completion out, or give the trainer an `expert_model` that scores it."
    )
    for logps in ([[-1.0, -1.0], None], None):
        number = 1 if logps else 0
        with pytest.raises(ValueError, match=re.escape(message.replace("completion 1", f"completion {number}"))):
            reader.check([row_of("0", logps=[-1.0, -1.0]), row_of(["0", "1"], logps=logps)])


@pytest.mark.parametrize("rows", [[], [row_of(None)], [row_of([]), row_of(None), row_of([])]])
def test_a_dataset_without_any_completion_is_refused(words, rows):
    message = "No row has a completion in the column 'expert': nothing could ever be injected. Fill it, or set num_injected_completions=0."
    with pytest.raises(ValueError, match=message):
        make_reader(words).check(rows)


def test_a_check_leaves_no_trace_in_the_counts(words):
    reader = make_reader(words, max_completion_length=3)
    rows = [row_of(None), row_of("0 1 2 3", logps=[-1.0] * 5, sources="a"), row_of(["0", "1"])]
    reader.check(iter(rows))
    assert (reader.num_read, reader.num_overlong) == (0, 0)
    reader.read(rows[2])
    assert (reader.num_read, reader.num_overlong) == (2, 0)
