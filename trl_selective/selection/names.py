"""Triggers and selectors by name: "group_failed", "zero_variance & with_probability", "reward_gain & learnable | shortest"."""

from collections.abc import Callable, Mapping
from functools import reduce
from operator import and_, or_
from typing import Any

from trl_selective.functional.schedules import Schedule
from trl_selective.selection.learned import Learned
from trl_selective.selection.selectors import (
    Diverse,
    First,
    Learnable,
    Novel,
    Random,
    RewardGain,
    Selector,
    Shortest,
)
from trl_selective.selection.triggers import Always, Below, GroupFailed, Trigger, WithProbability, ZeroVariance

SELECTORS: dict[str, type[Selector]] = {
    "first": First,
    "random": Random,
    "shortest": Shortest,
    "learnable": Learnable,
    "novel": Novel,
    "diverse": Diverse,
    "reward_gain": RewardGain,
    "learned": Learned,
}


def make_trigger(expression: str, threshold: float, probability: float | Schedule) -> Trigger:
    """The trigger that `expression` names.

    Args:
        expression: names, joined by `&` and `|`.
        threshold: of "below".
        probability: of "with_probability".

    Raises:
        ValueError: for an unknown name.
    """
    parts: dict[str, Callable[[], Trigger]] = {
        "always": Always,
        "group_failed": GroupFailed,
        "zero_variance": ZeroVariance,
        "below": lambda: Below(threshold),
        "with_probability": lambda: WithProbability(probability),
    }
    return combine(expression, parts, "injection_trigger")


def make_selector(expression: str) -> Selector:
    """The selector that `expression` names.

    Raises:
        ValueError: for an unknown name.
    """
    return combine(expression, SELECTORS, "injection_selector")


def combine(expression: str, parts: Mapping[str, Callable[[], Any]], setting: str) -> Any:
    """The part that `expression` names, or several joined by `&` and `|`, of which `&` binds closer. No brackets: build those in Python.

    Args:
        expression: names and operators.
        parts: what makes the part of each name.
        setting: where the expression comes from, for the message.

    Raises:
        ValueError: for an unknown or missing name.

    Example:
        >>> sorted(combine("a & b | c", {"a": lambda: {1, 2}, "b": lambda: {2, 3}, "c": lambda: {9}}, "example"))
        [2, 9]
    """
    alternatives = [[name.strip() for name in alternative.split("&")] for alternative in expression.split("|")]
    for name in (name for names in alternatives for name in names):
        if name not in parts:
            raise ValueError(
                f"{setting} must be one of {list(parts)}, or several of them joined by & and |, got {expression!r} with {name!r} in it."
            )
    return reduce(or_, (reduce(and_, (parts[name]() for name in names)) for names in alternatives))
