"""Names of what is compared, and what is said of files that cannot be read."""

import pytest

from trl_selective.reporting.inputs import named_paths, read_json, read_lines
from trl_selective.reporting.markdown import padded_table


def test_paths_are_called_by_what_tells_them_apart(tmp_path):
    for name in ("a/guided", "b/guided", "b/grpo/evaluation"):
        (tmp_path / name).mkdir(parents=True)
    one, other, evaluated = (str(tmp_path / name) for name in ("a/guided", "b/guided", "b/grpo/evaluation"))
    assert list(named_paths([one])) == ["guided"]
    assert list(named_paths([one, evaluated])) == ["guided", "grpo"]
    assert list(named_paths([one, other])) == ["a/guided", "b/guided"]
    assert named_paths([f"mine={one}", other]) == {"mine": tmp_path / "a/guided", "guided": tmp_path / "b/guided"}


def test_a_path_may_have_an_equals_sign(tmp_path):
    (tmp_path / "lr=1").mkdir()
    assert list(named_paths([str(tmp_path / "lr=1")])) == ["lr=1"]
    assert list(named_paths([f"x={tmp_path / 'lr=1'}"])) == ["x"]


def test_bad_paths(tmp_path):
    with pytest.raises(ValueError, match=r"There is no .*nowhere\. Expected a path, or NAME=PATH"):
        named_paths([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match=r"a is there twice\. Tell them apart by NAME=PATH"):
        named_paths([f"a={tmp_path}", f"a={tmp_path}"])
    with pytest.raises(ValueError, match="is there twice"):
        named_paths([str(tmp_path), str(tmp_path)])


def test_bad_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1')
    with pytest.raises(ValueError, match=r"a\.jsonl is not JSON .* still being written"):
        read_json(path)
    path.write_text('{"a": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected a JSON object, got '\[1\]'"):
        read_lines(path)
    path.write_text("")
    with pytest.raises(ValueError, match=r"a\.jsonl is empty"):
        read_lines(path)


def test_lines_end_where_json_lines_do(tmp_path):
    text = "one\u2028two"  # a line separator, which may stand in JSON as it is
    (tmp_path / "a.jsonl").write_text(f'{{"a": "{text}"}}\n\n{{"a": "three"}}\n')
    assert read_lines(tmp_path / "a.jsonl") == [{"a": text}, {"a": "three"}]


def test_markdown():
    assert padded_table(["", "pass@1"], [["a", "1.0"], ["long", "10.0"]]).splitlines() == [
        "|      | pass@1 |",
        "| ---- | -----: |",
        "| a    |    1.0 |",
        "| long |   10.0 |",
    ]
    assert padded_table(["word"], [["|"]]).splitlines()[-1] == "| \\|   |"
