"""`python -m trl_selective.reporting words`: the rates of chosen words, and the words that tell policy and expert apart."""

import json

import pandas as pd
import pytest

from tests.reporting.figures import names, panels, points
from trl_selective.reporting.__main__ import main
from trl_selective.reporting.samples import as_text, read_completions

POLICY = ["so we have it", "so we check it", "so it is", "so be it"]
EXPERT = ["okay let me check it", "okay let me check it", "okay let us see", "let me verify it"]
TRAINED = ["we check it", "we verify it", "let me check it", "okay it is"]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_tables(folder, steps):
    """TRL's tables: step -> its rows."""
    folder.mkdir(parents=True)
    for step, rows in steps.items():
        table = pd.DataFrame({"step": [step] * len(rows), "prompt": ["p"] * len(rows), **pd.DataFrame(rows)})
        table.to_parquet(folder / f"completions_{step:05d}.parquet")


@pytest.fixture
def files(tmp_path):
    """--policy, --expert and --trained, each two problems of two completions."""
    texts = {"policy": POLICY, "expert": EXPERT, "trained": TRAINED}
    paths = {
        name: write(tmp_path / f"{name}.jsonl", {"completions": each[:2]}, {"completions": each[2:]})
        for name, each in texts.items()
    }
    return ["--policy", paths["policy"], "--expert", paths["expert"], "--trained", f"mentor={paths['trained']}"]


def cells(printed):
    """Word -> the cells of its row."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


def test_given_words(tmp_path, files, drawn, capsys):
    main(["words", *files, "--words", "check", "Let me", "--output", str(tmp_path / "w.png")])
    table = cells(capsys.readouterr().out)
    assert table["word"] == ["policy", "expert", "mentor"]
    # check: in 1 of 4, 2 of 4, 2 of 4 completions; once in 4 + 4 + 3 + 3 = 14 words, twice in 5 + 5 + 4 + 4 = 18 and in 3 + 3 + 4 + 3 = 13
    assert table["check"] == ["25.0 (71.43)", "50.0 (111.11)", "50.0 (153.85)"]
    assert table["let me"] == ["0.0 (0.00)", "75.0 (166.67)", "25.0 (76.92)"]  # "let us" is something else
    shares = panels(drawn[0])["completions with the word"]
    assert [points(line) for line in shares.lines] == [[(25, 0), (0, 1)], [(50, 0), (75, 1)], [(50, 0), (25, 1)]]
    assert [label.get_text() for label in shares.get_yticklabels()] == ["check", "let me"]
    rates = panels(drawn[0])["occurrences"].lines[0]
    assert points(rates) == [(pytest.approx(1000 / 14), 0), (0, 1)]
    assert names(drawn[0].legends[0]) == ["policy", "expert", "mentor"]


def test_the_papers_words_are_the_default(tmp_path, files, capsys):
    main(["words", *files, "--output", str(tmp_path / "w.png")])
    assert list(cells(capsys.readouterr().out))[2:6] == ["verify", "check", "okay", "wait"]


def test_words_that_tell_policy_and_expert_apart(tmp_path, files, capsys):
    main(["words", *files, "--most_different", "3", "--output", str(tmp_path / "w.svg")])
    table = cells(capsys.readouterr().out)
    assert table["word"] == ["z", "policy", "expert", "mentor"]
    assert list(table)[2:] == ["let", "okay", "so"]  # 4 to 0, 3 to 0 and 0 to 4 occurrences
    assert [row[0][0] for row in list(table.values())[2:]] == ["+", "+", "-"]
    main(["words", *files, "--most_different", "100", "--output", str(tmp_path / "w.svg")])
    table = cells(capsys.readouterr().out)
    assert not any(" " in word for word in table)  # what the default words need two of is not counted
    assert len(table) == 2 + len(set(" ".join(POLICY + EXPERT).split()))


def test_rates_over_training_are_those_of_the_policys_own_rollouts(tmp_path, files, drawn, capsys):
    own = {"guided": False, "injected": False}
    rows = {
        step: [
            {"completion": "we wait" if step > 2 else "we go", **own},
            {"completion": "we go", **own},
            {"completion": "wait", "guided": True, "injected": False},
            {"completion": "wait", "guided": False, "injected": True},
        ]
        for step in (1, 2, 3, 10)
    }
    write_tables(tmp_path / "run" / "completions", rows)
    output = str(tmp_path / "w.png")
    main(["words", *files[:4], "--trained", str(tmp_path / "run"), "--words", "wait", "okay", "--output", output])
    axes = panels(drawn[0])
    assert list(axes) == ["wait", "okay"]
    policy, expert, trained = axes["wait"].lines
    assert points(trained) == [(1, 0), (2, 0), (3, 50), (10, 50)]  # one of two
    assert (policy.get_ydata()[0], axes["okay"].lines[1].get_ydata()[0]) == (0, 75)
    assert policy.get_linestyle() == expert.get_linestyle() == "--"
    table = cells(capsys.readouterr().out)
    assert table["word"] == ["policy", "expert", "run, steps 1-1", "run, steps 10-10"]
    assert table["wait"][2:] == ["0.0 (0.00)", "50.0 (250.00)"]  # 1 of 4 words


def test_many_steps_are_put_together(tmp_path, drawn, capsys):
    write_tables(tmp_path / "run", {step: [{"completion": "wait" if step % 2 else "go"}] for step in range(1, 41)})
    main(["words", "--trained", str(tmp_path / "run"), "--words", "wait", "--output", str(tmp_path / "w.png")])
    (line,) = panels(drawn[0])["wait"].lines
    assert points(line) == [(1.5 + 2 * number, 50) for number in range(20)]  # pairs of steps, one of two
    assert cells(capsys.readouterr().out)["word"] == ["run, steps 1-2", "run, steps 39-40"]


def test_what_is_read(tmp_path):
    messages = [{"role": "assistant", "content": "wait"}, {"role": "tool", "content": None}]
    assert as_text(messages) == "wait"
    path = tmp_path / "a.jsonl"
    write(path, {"completion": "a"}, {"completion": messages}, {"completions": ["b", messages]}, {"completions": []})
    assert read_completions(path) == ["a", "wait", "b", "wait"]
    write(path, {"prompt": "p", "expert_completions": ["a", "b"]}, {"prompt": "p", "expert_completions": "c"})
    assert read_completions(path) == ["a", "b", "c"]
    evaluation = tmp_path / "run" / "evaluation"
    evaluation.mkdir(parents=True)
    write(evaluation / "results.json", {"benchmarks": {"x": {}, "y": {}}})
    for name in ("x", "y"):
        write(evaluation / f"{name}.jsonl", {"completions": [name]})
    assert read_completions(tmp_path / "run") == read_completions(evaluation) == ["x", "y"]
    write_tables(tmp_path / "tables", {3: [{"completion": messages}, {"completion": messages}]})
    assert read_completions(tmp_path / "tables" / "completions_00003.parquet") == {3: ["wait", "wait"]}


def test_one_conversation_may_stand_alone(tmp_path):
    message = {"role": "assistant", "content": "wait"}
    rows = [{"expert_completions": value} for value in ([message], [[message], [message]], "wait", ["wait"], [])]
    path = tmp_path / "with_expert.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_completions(path) == ["wait"] * 5


def fails(capsys, *arguments):
    """What is said when it ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(["words", *arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_bad_input(tmp_path, files, capsys):
    assert "Whose words? Give --policy, --expert or --trained." in fails(capsys)
    assert "No completion has any of the words ['lorem', 'ipsum dolor']" in fails(
        capsys, *files, "--words", "lorem", "ipsum dolor"
    )
    assert (
        "compares --policy and --expert, and takes a number of at least 1. Got 3, and completions of ['expert']"
        in fails(capsys, *files[2:4], "--most_different", "3")
    )
    assert "Got 0, and" in fails(capsys, *files, "--most_different", "0")
    assert "not allowed with argument" in fails(capsys, *files, "--words", "check", "--most_different", "3")
    assert "expert is there twice" in fails(capsys, *files[:4], "--trained", files[3])


def test_bad_files(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    assert "line 1: expected one of the columns ('completions', " in fails(
        capsys, "--policy", write(path, {"text": "x"})
    )
    assert "has no completions: all its lists are empty" in fails(capsys, "--policy", write(path, {"completions": []}))
    (tmp_path / "empty").mkdir()
    assert "empty has no completions. Expected .jsonl with a column" in fails(
        capsys, "--policy", str(tmp_path / "empty")
    )
    path.rename(tmp_path / "a.txt")
    assert "a.txt has no completions. Expected .jsonl" in fails(capsys, "--policy", str(tmp_path / "a.txt"))


def test_bad_tables(tmp_path, capsys):
    write_tables(tmp_path / "run", {1: [{"completion": "a", "guided": True}]})
    assert "no rollouts of the policy itself: all are guided or injected" in fails(
        capsys, "--trained", str(tmp_path / "run")
    )
    write_tables(tmp_path / "other", {1: [{"text": "a"}]})
    assert "has the columns ['step', 'prompt', 'text'], not step and completion" in fails(
        capsys, "--trained", str(tmp_path / "other")
    )
    write_tables(tmp_path / "plain", {1: [{"completion": "a"}]})
    assert "has the rollouts of a whole training, but --policy is one model" in fails(
        capsys, "--policy", str(tmp_path / "plain")
    )
