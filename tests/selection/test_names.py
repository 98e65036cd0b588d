"""Triggers and selectors by name, alone and combined."""

import re

import pytest
import torch

from tests.selection.groups import candidates
from trl_selective.functional import linear
from trl_selective.selection import (
    SELECTORS,
    Always,
    Below,
    GroupFailed,
    GroupOutcomes,
    Learned,
    WithProbability,
    ZeroVariance,
    choose,
    make_selector,
    make_trigger,
)


@pytest.mark.parametrize(
    ("expression", "trigger"),
    [
        ("always", Always()),
        ("group_failed", GroupFailed()),
        ("zero_variance", ZeroVariance()),
        ("below", Below(0.25)),
        ("with_probability", WithProbability(0.75)),
        ("  group_failed ", GroupFailed()),
        ("group_failed&zero_variance", GroupFailed() & ZeroVariance()),
        ("group_failed | below", GroupFailed() | Below(0.25)),
        (
            "group_failed & with_probability | zero_variance & below",
            (GroupFailed() & WithProbability(0.75)) | (ZeroVariance() & Below(0.25)),
        ),
        ("always | below & group_failed", Always() | (Below(0.25) & GroupFailed())),
        ("always & below & group_failed", (Always() & Below(0.25)) & GroupFailed()),
    ],
)
def test_a_trigger_by_name(expression, trigger):
    assert make_trigger(expression, threshold=0.25, probability=0.75) == trigger


def test_a_schedule_may_be_the_probability():
    trigger = make_trigger("with_probability", 0.0, linear(1.0, 0.0, 4))
    rewards, noise = torch.zeros(1, 2), torch.full((1,), 0.5, dtype=torch.float64)
    fires = [trigger(GroupOutcomes(rewards, rewards > 0, noise, step)).item() for step in range(4)]
    assert fires == [True, True, False, False]  # 1, 0.75, 0.5, 0.25


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_by_name_says_its_name(name):
    assert make_selector(name).name == name
    assert type(make_selector(name)) is SELECTORS[name]


@pytest.mark.parametrize(
    ("expression", "name", "needs_logps", "needs_gains"),
    [
        ("first", "first", False, False),
        ("learnable", "learnable", True, False),
        ("reward_gain", "reward_gain", False, True),
        ("learned", "learned", False, False),
        ("learned & learnable", "learned & learnable", True, False),
        ("shortest & novel", "shortest & novel", False, False),
        ("novel&learnable", "novel & learnable", True, False),
        ("random & first & shortest", "random & first & shortest", False, False),
        ("reward_gain & learnable", "reward_gain & learnable", True, True),
    ],
)
def test_what_a_combination_needs(expression, name, needs_logps, needs_gains):
    selector = make_selector(expression)
    assert (selector.name, selector.needs_logps, selector.needs_gains) == (name, needs_logps, needs_gains)
    fallback = make_selector(f"{expression} | shortest")
    assert (fallback.needs_logps, fallback.needs_gains) == (needs_logps, needs_gains)
    fallback = make_selector(f"shortest | {expression}")
    assert (fallback.needs_logps, fallback.needs_gains) == (needs_logps, needs_gains)


def test_and_binds_closer_than_or():
    """The best reward that is short, or else the first: nothing is better than the group, so that the first is taken."""
    group = candidates([1, 1, 1], [2], gains=[-1.0, -2.0])
    (pick,) = choose(make_selector("reward_gain & shortest | first"), group, 1)
    assert (pick.index, pick.selector) == (0, "first")
    group = candidates([1, 1, 1], [2], gains=[1.0, 2.0])
    (pick,) = choose(make_selector("reward_gain & shortest | first"), group, 1)
    assert (pick.index, pick.selector) == (1, "reward_gain & shortest")


def test_each_learned_selector_learns_for_itself():
    first, second = make_selector("learned"), make_selector("learned")
    assert first.learners()[0].model is not second.learners()[0].model
    both = make_selector("learned & shortest | novel & learned")
    assert [type(learner) for learner in both.learners()] == [Learned, Learned]
    assert both.learners()[0].model is not both.learners()[1].model
    assert make_selector("first | novel & shortest").learners() == []


BAD = [
    "",
    "  ",
    "failed",
    "always &",
    "| always",
    "always && always",
    "always and always",
    "(always)",
    "Always",
    "always, below",
]


@pytest.mark.parametrize("expression", BAD)
def test_an_unknown_trigger_is_named(expression):
    missing = next(name.strip() for name in re.split(r"[&|]", expression) if name.strip() != "always")
    message = (
        "injection_trigger must be one of ['always', 'group_failed', 'zero_variance', 'below', 'with_probability'], or several of them "
        f"joined by & and |, got {expression!r} with {missing!r} in it."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_trigger(expression, 0.0, 1.0)


@pytest.mark.parametrize("expression", ["", "fist", "first |", "first & always", "first | shortest & novell"])
def test_an_unknown_selector_is_named(expression):
    missing = next(name.strip() for name in re.split(r"[&|]", expression) if name.strip() not in SELECTORS)
    message = f"injection_selector must be one of {list(SELECTORS)}, or several of them joined by & and |, got {expression!r} with {missing!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)} in it"):
        make_selector(expression)
