r"""The answer in the last `\boxed{}` of a text, and whether two of them are equal.

Math-Verify decides that; here is what models write and it does not read, and where it is too generous:

* It drops what may be a unit at the end, `t`, `m` and `ab` among it. Here that is done only where a number remains of the right answer:
  `2 m` is `2`, but `x + t` is not `x`.
* It compares numbers by 6 decimals, and by 15 where they are exact, so that all that is small enough is equal. Here small ones have to agree in
  4 digits.
"""

import re
from functools import cache
from typing import Any

BOXED = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped one, as in `\{1, 2\}`, opens and closes nothing
BLANK = r"(?:\\[,;:! ]|\{\\,\}|~|\s)"
REWRITTEN = (
    (re.compile("°"), r"^\\circ"),
    (re.compile(r"\*\*"), ""),
    (re.compile(r"\\varnothing"), r"\\emptyset"),
    (re.compile(r"\\(?:mathbf|boldsymbol|bm)\s*(?=\{)"), ""),
    (re.compile(r"\\text\s*\{\s*([-+]?\d[\d.,/]*)\s*\}"), r"\1"),
    (re.compile(rf"(?<=\d){BLANK}(?=\d{{3}}(?!\d))"), ""),  # 58\,500
    (re.compile(r"(?<![\w.])(\d*\.?\d+)[eE]\+?(-?\d+)(?!\w)"), r"\1 \\times 10^{\2}"),
    (re.compile(r"^(\\boxed\s*\{)\s*(?:\\approx|\\simeq|≈)"), r"\1"),
    (re.compile(rf"(?:{BLANK}|[.,])+\}}$"), "}"),  # \boxed{5.}
)
COMMAND = re.compile(r"\\(?!text|mathrm|mbox|circ)[A-Za-z]+")
UNIT = re.compile(r"[A-Za-z%$]")
TEXT = re.compile(r"\\(?:text|textbf|mathrm)\s*\{([^{}]*)\}")
SMALL, PRECISION = 1e-2, 1e-4


def last_boxed(text: str) -> str | None:
    r"""The last `\boxed{...}` of a text, up to the brace that closes it; None if there is none or it stays open."""
    boxes = [box.end() - 1 for box in BOXED.finditer(text)]
    depth = 0
    for brace in BRACE.finditer(text, boxes[-1]) if boxes else ():
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return rf"\boxed{text[boxes[-1] : brace.end()]}"
    return None


def is_equal(right: str, answer: str | None, timeout: int | None) -> bool | None:
    r"""Whether an answer is the right one as a mathematical expression; None if the right one cannot be read.

    Args:
        right, answer: with `\boxed{}` around them; no answer is a wrong one.
        timeout: seconds for each step, by a signal, which only the main thread receives; None for no limit.
    """
    from math_verify import verify

    right, answer = _rewritten(right), _rewritten(answer or r"\boxed{}")
    can_be_read = False
    for drops_units in (False, True):
        gold, said = (_read(text, drops_units, timeout) for text in (right, answer))
        can_be_read |= bool(gold)
        if not gold or (drops_units and getattr(gold[0], "free_symbols", True)):
            continue
        if _plain(right) == _plain(answer):
            return True
        if verify(gold, said, allow_set_relation_comp=True, timeout_seconds=timeout) and not _differ(gold[0], said[0]):
            return True
        if not any(UNIT.search(COMMAND.sub("", text)) for text in (right, answer)):
            break  # there is no unit to drop
    return False if can_be_read else None


def _rewritten(box: str) -> str:
    for pattern, replacement in REWRITTEN:
        box = pattern.sub(replacement, box)
    return box


@cache
def _extraction(drops_units: bool) -> Any:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    normalization = NormalizationConfig(units=drops_units, malformed_operators=True, nits=True)
    return LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)


def _read(box: str, drops_units: bool, timeout: int | None) -> list[Any]:
    """What Math-Verify reads: an expression of SymPy, and its text."""
    from math_verify import parse

    return parse(box, extraction_config=[_extraction(drops_units)], parsing_timeout=timeout)


def _plain(box: str) -> str:
    r"""Without `\text`, and with single blanks."""
    return " ".join(TEXT.sub(r"\1", box).split())


def _differ(right: Any, answer: Any) -> bool:
    """Whether two numbers that pass for equal differ in their first digits, being small."""
    try:
        numbers = complex(right), complex(answer)
    except (OverflowError, TypeError, ValueError):  # too large, or no numbers
        return False
    size = max(map(abs, numbers))
    return size < SMALL and abs(numbers[0] - numbers[1]) > PRECISION * size
