"""Answers as models write them, and what Math-Verify would let pass."""

import pytest

from trl_selective.boxed_answers import is_equal, last_boxed


def compare(right: str, answer: str) -> bool | None:
    return is_equal(rf"\boxed{{{right}}}", rf"\boxed{{{answer}}}", timeout=5)


@pytest.mark.parametrize(
    ("right", "answer"),
    [
        ("90", "90°"),
        (r"90^\circ", "90°"),
        ("58500", r"58\,500"),
        ("1000000", r"1\;000\;000"),
        ("1024", r"1{\,}024"),
        ("4.5e33", r"4.5 \times 10^{33}"),
        (r"5 \times 10^{-4}", "5e-4"),
        ("41.8", r"\approx 41.8"),
        ("5", r"5\,"),
        ("5", "**5**"),
        ("5", "5. "),
        ("1.25", r"\text{1.25}"),
        (r"\frac12", r"\mathbf{\frac{1}{2}}"),
        (r"\emptyset", r"\varnothing"),
        (r"\text{June 20}", "June 20"),
        (r"\text{A,C,D}", "A,C,D"),
        ("[-2,7]", r"-2\le x\le 7"),
        (r"(-\infty,2)", "x<2"),
    ],
)
def test_other_ways_to_write_it(right, answer):
    assert compare(right, answer) is True
    assert compare(right, r"\text{another}") is False


@pytest.mark.parametrize(
    ("right", "answer", "expected"),
    [
        ("a + b + c", "a + c + b", True),
        ("x + t", "t + x", True),
        (r"\frac52 t", r"\frac{5t}{2}", True),
        (r"\sin t", r"\sin(t)", True),
        ("x + c", "x + d", False),
        ("a^2 + 2ab", "a^2 + 2", False),
        (r"\frac{x}{2} t", r"\frac{x}{2}", False),
        ("4", "4 m", True),
        ("4", r"4 \text{ metres}", True),
        (r"4 \text{ m}", "4", True),
        ("4 m", "4", True),
        (r"\$4", "4", True),
        ("4", "5 m", False),
        (r"\{1, 2\} \text{ cm}", "1, 2", True),
    ],
)
def test_letters_are_variables_unless_a_number_remains(right, answer, expected):
    assert compare(right, answer) is expected


@pytest.mark.parametrize(
    ("right", "answer", "expected"),
    [
        (r"2.88 \times 10^{-19}", r"1 \times 10^{-30}", False),
        (r"4.6 \times 10^{-24}", r"-4.6 \times 10^{-24}", False),
        (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}", False),
        (".0000672", "0.000067", False),
        (r"2.88 \times 10^{-19}", r"2.88 \cdot 10^{-19}", True),
        (r"2.88 \times 10^{-19}", r"28.8 \times 10^{-20}", True),
        ("0", r"10^{-20}", False),
        ("0", "0.0", True),
        ("0.01", r"\frac{1}{100}", True),
        (r"50\%", "0.5", True),
        (r"1\%", r"0.01", True),
        (r"10^{400}", r"10^{400}", True),
        (r"10^{400}", r"10^{401}", False),
    ],
)
def test_small_numbers_agree_in_their_first_digits(right, answer, expected):
    assert compare(right, answer) is expected


def test_what_cannot_be_read():
    assert compare("", "4") is None
    assert compare("4", "") is False
    assert is_equal(r"\boxed{4}", None, timeout=5) is False
    assert compare("1,234", "1, 234 ") is compare("1,234", "1, 234")  # blanks beside a comma are left to Math-Verify


@pytest.mark.parametrize(
    ("text", "boxed"),
    [(r"a \boxed{b{c}d} e", r"\boxed{b{c}d}"), (r"\boxed{a} \boxed{b", None), (r"\boxed {a{b}} e", r"\boxed{a{b}}"), ("\\boxed\n{a}", r"\boxed{a}"), ("no", None), (r"\boxed{\{1\}}", r"\boxed{\{1\}}"), (r"\boxed{\left\{a\\{b}\right.} e", r"\boxed{\left\{a\\{b}\right.}")],
)  # fmt: skip
def test_last_boxed(text, boxed):
    assert last_boxed(text) == boxed
