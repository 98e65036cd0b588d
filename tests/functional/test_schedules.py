"""Schedules at their ends, their middles and their joints."""

import doctest
import math

import pytest

from trl_selective.functional import constant, cosine, join, linear, schedules


def test_constant():
    assert [constant(0.3)(step) for step in (0, 1, 10**9)] == [0.3] * 3


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_ends(schedule):
    values = schedule(2.0, 0.5, steps=10)
    assert values(0) == 2.0
    assert [values(step) for step in (10, 11, 10**9)] == [0.5] * 3
    assert values(9) > 0.5
    assert schedule(2.0, 0.5, steps=0)(0) == 0.5


def test_linear_numbers():
    # 1 + (3 - 1) * 1/4, 2/4, 3/4
    assert [linear(1.0, 3.0, steps=4)(step) for step in range(5)] == [1.0, 1.5, 2.0, 2.5, 3.0]


def test_cosine_numbers():
    paper = cosine(1.0, 0.0, steps=120)
    assert paper(60) == pytest.approx(0.5)  # the middle
    assert paper(30) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))  # cos(pi / 4)
    assert paper(40) == pytest.approx(0.75)  # cos(pi / 3) = 1/2
    assert cosine(3.0, 1.0, steps=2)(1) == pytest.approx(2.0)
    values = [paper(step) for step in range(121)]
    assert values == sorted(values, reverse=True)
    assert paper(119) > 0 == paper(120)


def test_join_starts_each_schedule_at_its_boundary():
    both = join([constant(1.0), linear(0.0, 1.0, steps=4), cosine(1.0, 0.0, steps=2)], boundaries=[3, 10])
    assert [both(step) for step in (0, 2)] == [1.0, 1.0]
    assert [both(step) for step in (3, 4, 7, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert [both(step) for step in (10, 11, 12, 99)] == [1.0, pytest.approx(0.5), 0.0, 0.0]
    assert join([constant(7.0)], boundaries=[])(123) == 7.0


@pytest.mark.parametrize(("num", "boundaries"), [(2, []), (2, [1, 2]), (3, [5, 4]), (0, [])])
def test_join_names_wrong_boundaries(num, boundaries):
    message = f"one ascending boundary fewer than schedules, got {num} schedules and boundaries "
    with pytest.raises(ValueError, match=message):
        join([constant(0.0)] * num, boundaries)


def test_examples_run():
    assert doctest.testmod(schedules) == doctest.TestResults(failed=0, attempted=2)
