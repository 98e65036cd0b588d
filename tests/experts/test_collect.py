"""What `collect` writes is what `CompletionReader` reads, whatever happens on the way."""

import json
import re
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from datasets import load_dataset
from transformers import AutoTokenizer

from tests.training import EXPERT, path_dataset, path_reward
from trl_selective.experts import CompletionReader, LocalSource, Sampling, collect, load_expert
from trl_selective.experts.sources import Completion
from trl_selective.grading import Verifier

ROWS = path_dataset(10)
SAMPLING = Sampling(num_completions=3, max_completion_length=18, temperature=1.5)  # some are wrong, some are cut off
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %} {% endfor %}"


def make_source(sampling=SAMPLING, name="expert", chat_template=None, **settings):
    tokenizer = AutoTokenizer.from_pretrained(EXPERT)
    tokenizer.chat_template = chat_template
    expert = load_expert(EXPERT, torch.device("cpu"))
    return LocalSource(expert, tokenizer, name, sampling, policy_tokenizer=tokenizer, batch_size=9, **settings)


@pytest.fixture(scope="module")
def source():
    return make_source()


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory):
    """An undisturbed run: the folder of its file, and what it counted."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, collect(ROWS, source, Verifier([path_reward]), folder / "out.jsonl")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def interrupted(unbroken, folder, keep):
    """A copy of the file as an interruption leaves it: its first `keep` bytes."""
    path = shutil.copytree(unbroken[0], folder / "copy") / "out.jsonl"
    path.write_bytes(path.read_bytes()[:keep])
    return path


class Canned:
    """A source that says what it is told, for one row."""

    name, sampling, settings = "canned", Sampling(), {}

    def __init__(self, *completions):
        self.completions = list(completions)

    def complete(self, prompts, first):
        yield from [self.completions][first:]


def test_rows_are_kept_and_completions_are_judged(unbroken):
    lines = read_lines(unbroken[0] / "out.jsonl")
    assert [{name: line[name] for name in ROWS.column_names} for line in lines] == ROWS.to_list()
    for line in lines:
        grid = [[line[name]] * len(line["expert_completions"]) for name in ("walls", "start", "goal")]
        assert line["expert_rewards"] == path_reward(line["expert_completions"], *grid)
        assert line["expert_sources"] == ["expert"] * len(line["expert_completions"])
        sizes = [
            1 + len(text.split()) for text in line["expert_completions"]
        ]  # the end token has a log-probability too
        assert [len(logps) for logps in line["expert_logprobs"]] == sizes


def test_the_tally_counts_everything_once(unbroken):
    lines, tally = read_lines(unbroken[0] / "out.jsonl"), unbroken[1]
    rewards = [reward for line in lines for reward in line["expert_rewards"]]
    assert 0 < sum(rewards) < len(rewards) < 30
    assert asdict(tally) == {
        "num_resumed": 0,
        "num_rows": 10,
        "num_drawn": 30,
        "num_unfinished": 30 - len(rewards),
        "num_scored": len(rewards),
        "num_right": sum(rewards),
        "num_kept": len(rewards),
        "num_without_logprobs": 0,
    }


@pytest.mark.parametrize("is_chat", [False, True], ids=["text", "chat"])
def test_the_reader_takes_it_as_it_is(unbroken, tmp_path, is_chat):
    """Through `datasets`, with log-probabilities checked against the tokens that the policy reads."""
    path = unbroken[0] / "out.jsonl"
    if is_chat:
        path = tmp_path / "chat" / "out.jsonl"
        rows = ROWS.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
        collect(rows, make_source(chat_template=TEMPLATE), Verifier([]), path)
    tokenizer = AutoTokenizer.from_pretrained(EXPERT)
    tokenizer.chat_template = TEMPLATE
    reader = CompletionReader(
        tokenizer=tokenizer,
        eos_token_ids=[1],
        max_completion_length=18,
        completions_column="expert_completions",
        logprobs_column="expert_logprobs",
        sources_column="expert_sources",
        overlong="drop",
        needs_logps=True,
        render=lambda messages, is_prompt: tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=is_prompt
        ),
    )
    rows = load_dataset(str(path.parent), split="train", cache_dir=str(tmp_path / "cache"))
    reader.check(rows)
    found = [completion for row in rows for completion in reader.read(row)]
    lines = read_lines(unbroken[0] / "out.jsonl")
    texts = [text for line in lines for text in line["expert_completions"]]
    assert [tokenizer.decode(each.token_ids[:-1]) for each in found] == texts
    logps = [logps for line in lines for logps in line["expert_logprobs"]]
    assert [list(each.logps) for each in found] == [pytest.approx(each, abs=1e-12) for each in logps]
    assert {each.source for each in found} == {"expert"}


def test_the_experts_chat_template_gets_its_arguments():
    def answers(prompt: str, template: str, **settings) -> list:
        source = make_source(chat_template=template, **settings)
        return list(source.complete([[{"role": "user", "content": prompt}]] * 3, 0))

    expected = answers("7 8 0 > 21 :", TEMPLATE)
    assert answers("0 > 21 :", "{{ walls }}" + TEMPLATE, chat_template_kwargs={"walls": "7 8 "}) == expected
    assert answers("0 > 21 :", "{{ walls }}" + TEMPLATE) != expected


def test_only_what_is_right_can_be_kept(unbroken, source, tmp_path):
    tally = collect(ROWS, source, Verifier([path_reward]), tmp_path / "out.jsonl", only_above=0.5)
    for line, everything in zip(
        read_lines(tmp_path / "out.jsonl"), read_lines(unbroken[0] / "out.jsonl"), strict=True
    ):
        is_right = [reward == 1.0 for reward in everything["expert_rewards"]]
        for name in ("expert_completions", "expert_logprobs", "expert_sources", "expert_rewards"):
            assert line[name] == [value for value, right in zip(everything[name], is_right, strict=True) if right]
    assert tally == replace(unbroken[1], num_kept=unbroken[1].num_right)


def test_a_reward_that_does_not_apply_is_null_and_not_above_anything(tmp_path):
    row, verifier = ROWS.select([0]), Verifier([lambda completions, **columns: [None, 0.0][: len(completions)]])
    source = Canned(Completion("U 1", is_whole=True), Completion("D 13", is_whole=True))
    tally = collect(row, source, verifier, tmp_path / "all.jsonl")
    (line,) = read_lines(tmp_path / "all.jsonl")
    assert (line["expert_rewards"], line["expert_logprobs"]) == ([None, 0.0], [None, None])
    assert (tally.num_scored, tally.num_right, tally.num_without_logprobs) == (1, 0, 2)
    collect(row, source, verifier, tmp_path / "above.jsonl", only_above=-1)
    (line,) = read_lines(tmp_path / "above.jsonl")
    assert line["expert_completions"] == ["D 13"]


def test_a_row_without_any_whole_completion(tmp_path):
    def unexpected(**columns):
        raise AssertionError("there is nothing to grade")

    collect(ROWS.select([0]), Canned(Completion("", is_whole=False)), Verifier([unexpected]), tmp_path / "out.jsonl")
    (line,) = read_lines(tmp_path / "out.jsonl")
    assert [line[name] for name in ("expert_completions", "expert_logprobs", "expert_sources", "expert_rewards")] == [
        []
    ] * 4


def test_a_row_is_on_disk_before_the_next_one_is_asked_for(tmp_path):
    path, found = tmp_path / "out.jsonl", []

    class Watching(Canned):
        def complete(self, prompts, first):
            for _ in prompts:
                found.append(len(read_lines(path)))
                yield self.completions

    collect(ROWS.select(range(3)), Watching(Completion("U 1", is_whole=True)), Verifier([]), path)
    assert found == [0, 1, 2]


@pytest.mark.parametrize("share", [0, 0.3, 0.75, 1])
def test_a_broken_run_goes_on_as_if_unbroken(unbroken, source, tmp_path, share):
    """Cut within a line: what stands there is dropped and done again."""
    whole = (unbroken[0] / "out.jsonl").read_bytes()
    path = interrupted(unbroken, tmp_path, round(share * len(whole)))
    tally = collect(ROWS, source, Verifier([path_reward]), path)
    assert path.read_bytes() == whole
    complete_lines = whole[: round(share * len(whole))].count(b"\n")
    assert (tally.num_resumed, tally.num_rows) == (complete_lines, 10 - complete_lines)


def test_a_last_line_that_lacks_its_end_is_done_again(unbroken, source, tmp_path):
    whole = (unbroken[0] / "out.jsonl").read_bytes()
    path = interrupted(unbroken, tmp_path, len(whole) - 1)
    assert collect(ROWS, source, Verifier([path_reward]), path).num_resumed == 9
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ROWS.select([0, 2, 1]),
            r"Row 1 of .* is not that of the dataset: \['prompt', 'walls', 'start', 'goal'\] differ",
        ),
        (
            ROWS.add_column("level", [1] * 10),
            r"Row 0 of .*: \['level'\] differ. The file was made from other data: go on with",
        ),
        (ROWS.select(range(4)), "has more rows than the dataset, 4. Name another file, or delete it"),
    ],
)
def test_a_file_of_other_rows_is_refused_and_left_alone(unbroken, source, tmp_path, rows, message):
    path = interrupted(unbroken, tmp_path, keep=None)
    with pytest.raises(ValueError, match=message):
        collect(rows, source, Verifier([path_reward]), path)
    assert path.read_bytes() == (unbroken[0] / "out.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": make_source(replace(SAMPLING, temperature=0.7))}, "with temperature=1.5 according to .out.jsonl.settings, got 0.7"),
        ({"source": make_source(replace(SAMPLING, seed=1))}, "with seed=0"),
        ({"source": make_source(chat_template_kwargs={"enable_thinking": False})}, "with chat_template_kwargs={}"),
        ({"source": make_source(name="other")}, "with expert='expert' according to .out.jsonl.settings, got 'other'"),
        ({"verifier": Verifier([])}, "with verifier={'path_reward': 1.0}"),
        ({"only_above": 0.5}, "with only_above=None"),
    ],
)  # fmt: skip
def test_other_settings_are_refused(unbroken, source, tmp_path, change, message):
    path = interrupted(unbroken, tmp_path, keep=None)
    settings = {"source": source, "verifier": Verifier([path_reward]), "only_above": None, **change}
    with pytest.raises(
        ValueError, match=f"{re.escape(message)}.* Go on with the settings of the file, name another one"
    ):
        collect(ROWS, path=path, **settings)


def test_a_file_of_somebody_else_is_refused(source, tmp_path):
    (tmp_path / "out.jsonl").write_text("precious\n")
    with pytest.raises(ValueError, match=r"was made with expert='unknown' according to \.out\.jsonl\.settings"):
        collect(ROWS, source, Verifier([]), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (ROWS.rename_column("prompt", "question"), {}, r"Expected rows with a column 'prompt', .* got \['question'"),
        (ROWS.rename_column("walls", "expert_rewards"), {}, "'expert_rewards', 'start', 'goal'.* Rename what is in the way"),
        (ROWS, {"only_above": 0.5}, "only_above=0.5 needs a reward to compare, got no reward functions"),
        (ROWS.add_column("x", [float("nan")] * 10), {}, "Row 0 cannot be written as JSON: .* Remove that column, or make it text"),
    ],
)  # fmt: skip
def test_what_cannot_be_collected_is_refused(source, tmp_path, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        collect(rows, source, Verifier([]), tmp_path / "out.jsonl", **settings)
