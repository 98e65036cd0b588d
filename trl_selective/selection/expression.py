"""Triggers and selectors by name: "group_failed", "zero_variance & with_probability", "reward_gain & learnable | shortest"."""

from collections.abc import Callable, Mapping
from functools import reduce
from operator import and_, or_
from typing import Any


def combine(expression: str, parts: Mapping[str, Callable[[], Any]], setting: str) -> Any:
    """The part that `expression` names, or several joined by `&` and `|`, of which `&` binds closer. No brackets: build those in Python.

    Args:
        expression: names and operators.
        parts: what makes the part of each name.
        setting: where the expression comes from, for the message.

    Raises:
        ValueError: for an unknown or missing name.

    Example:
        >>> combine("a & b | c", {"a": lambda: {1, 2}, "b": lambda: {2, 3}, "c": lambda: {9}}, "example")
        {9, 2}
    """
    alternatives = [[name.strip() for name in alternative.split("&")] for alternative in expression.split("|")]
    for name in (name for names in alternatives for name in names):
        if name not in parts:
            raise ValueError(
                f"{setting} must be one of {list(parts)}, or several of them joined by & and |, got {expression!r} with {name!r} in it."
            )
    return reduce(or_, (reduce(and_, (parts[name]() for name in names)) for names in alternatives))
