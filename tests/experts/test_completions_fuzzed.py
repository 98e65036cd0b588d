"""A dataset may hold anything: the reader reads it, or says in a `ValueError` which row is wrong and how."""

import functools

from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.experts.test_completions import make_reader
from tests.properties import for_all
from tests.training import POLICY

texts = st.one_of(
    st.text(max_size=8),
    st.lists(st.sampled_from(["0", "1", "~", "D", "<eos>", "<pad>", " ", "\n", "x"]), max_size=6).map(" ".join),
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), texts, st.binary(max_size=3), st.just(object())
)
messages = st.dictionaries(
    st.sampled_from(["role", "content", "name"]), st.one_of(st.just("assistant"), scalars), max_size=3
)
anything = st.recursive(
    st.one_of(scalars, messages),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(texts, inner, max_size=2)
    ),
    max_leaves=6,
)
well_formed = st.lists(texts, max_size=3)
numbers = st.lists(st.lists(st.floats(-5, 0.5), max_size=6), max_size=3)
rows = st.fixed_dictionaries(
    {"prompt": st.one_of(texts, st.lists(messages, max_size=2), anything)},
    optional={
        "expert": st.one_of(well_formed, anything),
        "logps": st.one_of(st.none(), numbers, anything),
        "sources": st.one_of(st.none(), well_formed, anything),
    },
)
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(POLICY)


def assert_reads_or_names(reader, row):
    for read in (reader.read, lambda row: reader.check([row])):
        try:
            found = read(row)
        except ValueError as refusal:
            message = str(refusal)
        else:
            message = None
        if message is not None:
            assert len(message) > 20
            continue
        for completion in found or ():
            assert 1 < len(completion.token_ids) <= reader.max_completion_length
            assert completion.logps is None or len(completion.logps) == len(completion.token_ids)
            assert completion.source is None or isinstance(completion.source, str)


@for_all(
    examples=120,
    row=rows,
    columns=st.tuples(st.sampled_from(["logps", None]), st.sampled_from(["sources", None])),
    needs_logps=st.booleans(),
    overlong=st.sampled_from(["drop", "truncate"]),
    max_completion_length=st.integers(2, 12),
)
def test_any_row(row, columns, needs_logps, overlong, max_completion_length):
    reader = make_reader(
        tokenizer(),
        TEMPLATE,
        logprobs_column=columns[0],
        sources_column=columns[1],
        needs_logps=needs_logps,
        overlong=overlong,
        max_completion_length=max_completion_length,
    )
    assert_reads_or_names(reader, row)
