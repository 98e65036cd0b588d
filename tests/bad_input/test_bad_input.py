"""Every row of the table is run, and the page says what the table says."""

import re

import pytest

from tests.bad_input.__main__ import main
from tests.bad_input.case import Case, Error, Warned
from tests.bad_input.table import SECTIONS

CASES = [
    pytest.param(case, id=re.sub(r"\W+", "_", f"{title}-{case.given}")[:100])
    for title, (_, cases) in SECTIONS.items()
    for case in cases
]


@pytest.mark.parametrize("case", CASES)
def test_what_comes_of_it(case: Case, tmp_path):
    case.check(tmp_path)


def test_the_page_is_up_to_date():
    assert main([]) == 0, "run `python -m tests.bad_input --write`"


def raising(text):
    def cause(folder):
        raise ValueError(text)

    return cause


@pytest.mark.parametrize(
    "says", ["got 3", "expected 4.", "got 3, expected 4. More", "got 3, expected 4!", "got …, expected 5."]
)
def test_another_text_is_noticed(tmp_path, says):
    Error("", raising("got 3, expected 4."), "got …, expected 4.").check(tmp_path)
    with pytest.raises(AssertionError, match=r"expected 4\.' is not"):
        Error("", raising("got 3, expected 4."), says).check(tmp_path)


def test_silence_is_noticed(tmp_path):
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        Error("", lambda folder: None, "").check(tmp_path)
    with pytest.raises(AssertionError, match="has not once"):
        Warned("", lambda folder: None, "something").check(tmp_path)
