"""The faults are still faults of the package as it is, and the runner tells those that are found from those that are not."""

import re

import pytest

from tests.mutations import ALL_MUTATIONS, __main__
from tests.mutations.mutation import PACKAGE, ROOT, TESTS, Mutation
from tests.mutations.runner import BROKEN, CAUGHT, SURVIVED, check_unchanged


@pytest.mark.parametrize("mutation", ALL_MUTATIONS, ids=lambda mutation: f"{mutation.file}: {mutation.breaks}")
def test_every_fragment_occurs_once(mutation):
    source = (ROOT / PACKAGE / mutation.file).read_text()
    assert source.count(mutation.find) == 1, f"take the fragment from {mutation.file} as it is now"
    changed = source.replace(mutation.find, mutation.replace)
    assert changed != source
    compile(changed, mutation.file, "exec")


def test_every_test_exists():
    for name in {name for mutation in ALL_MUTATIONS for name in mutation.tests_below(ROOT)}:
        assert name != TESTS, "name the tests: the whole suite takes minutes"
        path, _, function = name.partition("::")
        assert (ROOT / path).exists(), f"{path} has moved"
        assert not function or f"def {function}(" in (ROOT / path).read_text(), f"{name} has another name now"


def test_no_fault_is_listed_twice():
    assert len({(m.file, m.find, m.replace) for m in ALL_MUTATIONS}) == len(ALL_MUTATIONS) >= 40


def mutation(find: str, replace: str, **fields) -> Mutation:
    return Mutation("functional/schedules.py", find, replace, "an example", **fields)


def test_which_tests_are_run():
    assert mutation("", "").tests_below(ROOT) == ["tests/functional/test_schedules.py"]
    assert mutation("", "", tests=("a.py", "b.py::c")).tests_below(ROOT) == ["tests/a.py", "tests/b.py::c"]
    assert Mutation("__init__.py", "", "", "").tests_below(ROOT) == ["tests"]  # no mirror


def test_a_fragment_that_is_gone_is_named(tmp_path):
    (tmp_path / PACKAGE / "functional").mkdir(parents=True)
    (tmp_path / PACKAGE / "functional/schedules.py").write_text("twice twice")
    for find, count in {"gone": 0, "twice": 2}.items():
        with pytest.raises(ValueError, match=f"schedules.py has {count} times, expected once: '{find}'"):
            mutation(find, "").apply(tmp_path)


def test_the_command(monkeypatch, capsys):
    """What is found, what is not, and what cannot run; the file stays as it is."""
    before = (ROOT / PACKAGE / "functional/schedules.py").read_text()
    examples = [
        mutation("math.cos", "math.sin"),
        mutation("Half a cosine", "A cosine"),
        mutation("import math\n", "import no_such_module\n"),
    ]
    monkeypatch.setattr(__main__, "ALL_MUTATIONS", examples)
    assert __main__.main(["--jobs", "3"]) == 1
    outcomes = re.findall(r"an example \| (\w+) \| (.*) \| \d+ \|", capsys.readouterr().out)
    assert [outcome for outcome, _ in outcomes] == [CAUGHT, SURVIVED, BROKEN]
    assert outcomes[0][1] == "tests/functional/test_schedules.py::test_ends[cosine]"
    assert "1 error during collection" in outcomes[2][1]
    assert (ROOT / PACKAGE / "functional/schedules.py").read_text() == before


def test_where_all_are_caught_the_command_succeeds(monkeypatch, capsys):
    monkeypatch.setattr(__main__, "ALL_MUTATIONS", [mutation("math.cos", "math.sin")])
    assert __main__.main(["--skip-unchanged", "--only", "example"]) == 0
    assert "1 of 1 caught." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        __main__.main(["--only", "nothing like it"])


def test_tests_that_fail_anyway_judge_nothing():
    with pytest.raises(RuntimeError, match="fail without any mutation, and so can judge none"):
        check_unchanged([mutation("", "", tests=("functional/test_schedules.py::test_that_is_not_there",))])
