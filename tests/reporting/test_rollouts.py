"""The record of rollouts on disk, without a trainer."""

import math
from functools import partial

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.training import POLICY
from trl_selective.reporting.rollouts import (
    LoggedBatch,
    num_recorded,
    read_rollouts,
    recorded_steps,
    rollout_rows,
    token_records,
    token_texts,
    write_rollouts,
)
from trl_selective.rollout import GuidedRollout

ROLLOUT = GuidedRollout(
    completion_ids=[[5, 6]],
    sampling_per_token_logps=[[math.log(0.5), math.log(0.2)]],
    policy_per_token_logps=[[math.log(0.25), math.log(0.4)]],
    guidance_weights=[[0.75, 0.5]],
    entropies=[[1.5, 1.0]],
    expert_drawn=[[True, False]],
    policy_forwards=2,
    expert_forwards=2,
)
INJECTED = {"injected": [False] * 3 + [True], "injection_source": [None] * 3 + ["R1"],
            "injection_selector": [None] * 3 + ["learnable"], "injection_score": [None] * 3 + [0.25]}  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: what a byte-level vocabulary does to rare characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = byte_tokenizer()


def decode(ids):
    return BYTES.decode(list(ids))


def a_batch(**changes) -> LoggedBatch:
    """Two groups of two; row 1 is guided, row 3 injected."""
    values = {
        "prompts": ["a", "a", "b", "b"],
        "completions": ["w", "x", "y", "z"],
        "rewards": [0.0, 1.0, math.nan, 0.5],
        "rewards_per_func": {"right": [0.0, 1.0, math.nan, 0.5]},
        "advantages": [-1.0, 1.0, 0.0, 0.5],
        "num_generations": 2,
        "entropy_threshold": 2.0,
        "guidance_coef": 0.5,
        "extra": {"guided": [False, True, False, False], **INJECTED},
        "num_rows": 4,
        "rollout": ROLLOUT,
        "guided_rows": [1],
    }
    return LoggedBatch(**{**values, **changes})


def rows_of(batch: LoggedBatch, step: int = 1) -> list[dict]:
    return rollout_rows(batch, step, batch.token_records("<{}>".format), str)


# ---- Tokens ----------------------------------------------------------------------------------------------------------------------------


def test_a_character_of_several_tokens_comes_with_the_last_of_them():
    ids = BYTES("é🙂a").input_ids
    assert len(ids) == 2 + 4 + 1
    assert token_texts(ids, decode) == ["", "é", "", "", "", "🙂", "a"]


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_joined_tokens_are_the_text_also_where_bytes_are_no_characters(ids):
    texts = token_texts(ids, decode)
    assert len(texts) == len(ids)
    assert "".join(texts) == decode(ids)


def test_words_keep_their_spaces():
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    ids = [*tokenizer("~ D 6 R 7").input_ids, tokenizer.eos_token_id]
    texts = token_texts(ids, lambda ids: tokenizer.decode(list(ids)))
    assert texts == ["~", " D", " 6", " R", " 7", f" {tokenizer.eos_token}"]


def test_acceptance_is_equation_7():
    """min(1, 0.5 / 0.25) and 0.2 / 0.4."""
    (record,) = token_records(ROLLOUT, "<{}>".format)
    assert record["acceptance"] == pytest.approx([1.0, 0.5])
    assert record["expert_drawn"] == [True, False]
    assert record["guidance_weights"] == [0.75, 0.5]
    assert record["entropies"] == [1.5, 1.0]


# ---- Rows ------------------------------------------------------------------------------------------------------------------------------


def test_each_kind_of_row_has_its_record(tmp_path):
    path = write_rollouts(rows_of(a_batch(), step=7), tmp_path)
    assert path == tmp_path / "rollouts" / "rollouts_00007.parquet"
    own, guided, unscored, injected = read_rollouts(tmp_path)
    assert [row["kind"] for row in (own, guided, unscored, injected)] == [
        "on_policy",
        "guided",
        "on_policy",
        "injected",
    ]
    assert [(row["group"], row["row"]) for row in (own, guided, unscored, injected)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert own["tokens"] is own["source"] is injected["tokens"] is None
    assert len(guided["tokens"]) == len(guided["acceptance"]) == 2
    assert (guided["step"], guided["reward"], guided["rewards/right"], guided["advantage"]) == (7, 1.0, 1.0, 1.0)
    assert (guided["entropy_threshold"], guided["guidance_coef"]) == (2.0, 0.5)
    assert unscored["reward"] is unscored["rewards/right"] is None
    assert (injected["source"], injected["selector"], injected["score"]) == ("R1", "learnable", 0.25)


def test_a_guided_row_that_made_room_has_no_record_of_its_tokens():
    row = rows_of(a_batch(extra={"guided": [False] * 4, "injected": [False, True, False, False]}))[1]
    assert row["kind"] == "injected"
    assert "tokens" not in row


def test_conversations_are_rendered_once_per_group():
    calls = []

    def render(messages):
        calls.append(messages)
        return f"<user>{messages[0]['content']}"

    prompt = [{"role": "user", "content": "a"}]
    answer = [{"role": "assistant", "content": "x", "reasoning_content": "because"}]
    batch = a_batch(prompts=[prompt] * 4, completions=[answer] * 4, rollout=None)
    rows = rollout_rows(batch, 1, [None] * 4, render)
    assert [row["prompt"] for row in rows] == ["<user>a"] * 4
    assert [row["completion"] for row in rows] == ["because\nx"] * 4
    assert len(calls) == 2


# ---- Files -----------------------------------------------------------------------------------------------------------------------------


def test_steps_are_listed_in_order_and_read_alone(tmp_path):
    for step in (100_000, 2, 30):
        write_rollouts(rows_of(a_batch(), step), tmp_path)
    assert recorded_steps(tmp_path) == [2, 30, 100_000]
    assert {row["step"] for row in read_rollouts(tmp_path, [30])} == {30}
    assert [row["step"] for row in read_rollouts(tmp_path)] == [2] * 4 + [30] * 4 + [100_000] * 4
    assert num_recorded(tmp_path, 30) == 4


def test_a_step_that_is_repeated_is_replaced_and_an_interrupted_write_leaves_the_old_one(tmp_path, monkeypatch):
    path = write_rollouts(rows_of(a_batch()), tmp_path)
    write_rollouts(rows_of(a_batch(completions=["new"] * 4)), tmp_path)
    assert read_rollouts(tmp_path)[0]["completion"] == "new"

    def half(table, where, **options):
        where.write_bytes(b"PAR1 half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", half)
    with pytest.raises(OSError, match="disk full"):
        write_rollouts(rows_of(a_batch(completions=["lost"] * 4)), tmp_path)
    monkeypatch.undo()
    assert path.exists()
    assert read_rollouts(tmp_path)[0]["completion"] == "new"


def test_texts_that_no_file_can_hold_are_mended(tmp_path):
    hostile = "\ud800 \x00 \ud83d\ude42"  # a lone surrogate; NUL; a pair in two halves
    write_rollouts(rows_of(a_batch(completions=[hostile] * 4)), tmp_path)
    assert read_rollouts(tmp_path)[0]["completion"] == "\ufffd \x00 🙂"


def test_columns_have_types_also_where_all_is_null(tmp_path):
    empty = a_batch(extra={}, rollout=None, guided_rows=[], entropy_threshold=None)
    names = pq.read_schema(write_rollouts(rows_of(empty), tmp_path))
    assert str(names.field("acceptance").type) == "list<element: float>"
    assert str(names.field("entropy_threshold").type) == "double"


@pytest.mark.parametrize(
    ("prepare", "steps", "message"),
    [
        (lambda folder: None, None, r"has no rollouts/rollouts_<step>.parquet. Give the output_dir .* log_completions=True"),
        (partial(write_rollouts, rows_of(a_batch())), [1, 5], r"has no rollouts of steps \[5\], only of \[1\]"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(tmp_path, prepare, steps, message):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_rollouts(tmp_path, steps)


def test_damaged_and_foreign_files_are_named(tmp_path):
    path = write_rollouts(rows_of(a_batch()), tmp_path)
    pq.write_table(pq.read_table(path, columns=["step"]), path)
    with pytest.raises(ValueError, match=r"rollouts_00001\.parquet has no columns .*was not written by this trainer"):
        read_rollouts(tmp_path)
    path.write_bytes(b"PAR1 half")
    with pytest.raises(ValueError, match=r"rollouts_00001\.parquet is damaged"):
        read_rollouts(tmp_path)


@pytest.mark.parametrize("rows", [[], [{"step": 1}, {"step": 2}]])
def test_a_file_is_one_step(tmp_path, rows):
    with pytest.raises(ValueError, match="A file holds the rollouts of one step, got those of steps"):
        write_rollouts(rows, tmp_path)
