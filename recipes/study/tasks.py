"""The study's two tasks. Both ask for a walk from a start to a goal, verified move by move, with many right answers per problem.

    grid   "2 7 8 13 17 20 25 28 33 0 > 21 :"    "D 6 D 12 ~ D 18 D 24 ..."      9 walls of a 6x6 grid, start > goal : moves and cells
    sums   "3 7 8 3 > 32 :"                     "+8 11 ~ +7 18 +7 25 +7 32"     3 numbers that may be added or taken away, start > goal

`grid` is the quickstart's task. In `sums` the moves are arithmetic, on the numbers 0 to 39. In both, moves are decisions, the states follow
from them, and `~` is a filler without meaning. The level of a problem is the length of its shortest answer.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import task as quickstart
from task import FILLER

LARGEST = 39


class Problem(Protocol):
    walls: tuple[int, ...]
    start: int
    goal: int

    @property
    def prompt(self) -> str: ...
    def neighbours(self, state: int) -> list[tuple[str, int]]: ...
    def distances(self, origin: int) -> dict[int, int]: ...


@dataclass(frozen=True)
class SumsProblem(quickstart.Problem):
    """Three numbers, in the field `walls` of the grid: all that differs is where moves lead."""

    def neighbours(self, state: int) -> list[tuple[str, int]]:
        moves = [(f"{sign}{number}", state + number * int(f"{sign}1")) for number in self.walls for sign in "+-"]
        return [(move, to) for move, to in moves if 0 <= to <= LARGEST]


def random_sums_problem(rng: random.Random) -> SumsProblem:
    while True:
        numbers = tuple(sorted(rng.sample(range(1, 10), 3)))
        problem = SumsProblem(numbers, rng.randint(0, LARGEST), rng.randint(0, LARGEST))
        if 3 <= problem.distances(problem.goal).get(problem.start, 0) <= 6:
            return problem


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        problem, random_problem: the kind of its problems, and what draws one.
        words: all that prompts and answers are made of.
        max_completion_length: tokens of the longest answer, its fillers and the end token.
        longest_near: problems whose shortest answers have at most so many moves are near, the others far.
    """

    name: str
    problem: type
    random_problem: Callable[[random.Random], Problem]
    words: tuple[str, ...]
    max_completion_length: int
    longest_near: int

    def problems(self, number: int, seed: int, exclude: frozenset = frozenset()) -> list[Problem]:
        """`number` distinct problems, none of them in `exclude`; the same for the same seed."""
        return quickstart.problems(number, seed, exclude, draw=self.random_problem)

    def parse(self, prompt: str) -> tuple[Problem, str]:
        """The problem of a prompt, and what stands behind it: the beginning of an answer, where the prompt has one."""
        given, _, rest = prompt.partition(">")
        goal, _, beginning = rest.partition(":")
        *numbers, start = map(int, given.split())
        return self.problem(tuple(numbers), start, int(goal)), beginning.strip()

    def level(self, problem: Problem) -> str:
        return "near" if problem.distances(problem.goal)[problem.start] <= self.longest_near else "far"

    def solution(self, prompt: str, completion: str) -> tuple[int, ...] | None:
        """The states that an answer visits if it is right, else None. Fillers are ignored."""
        problem, beginning = self.parse(prompt)
        return quickstart.solution(problem, f"{beginning} {completion}")

    def reward(self, prompts, completions, **kwargs) -> list[float]:
        """1 for a right answer, 0 for a wrong one: a reward function as TRL calls it."""
        pairs = zip(prompts, completions, strict=True)
        return [float(self.solution(prompt, completion) is not None) for prompt, completion in pairs]


GRID = Task(
    "grid",
    quickstart.Problem,
    quickstart.random_problem,
    tuple(quickstart.WORDS),
    quickstart.MAX_COMPLETION_TOKENS,
    longest_near=6,
)
SUMS = Task(
    "sums",
    SumsProblem,
    random_sums_problem,
    (
        *map(str, range(LARGEST + 1)),
        *(f"{sign}{number}" for number in range(1, 10) for sign in "+-"),
        ">",
        ":",
        FILLER,
    ),
    quickstart.MAX_COMPLETION_TOKENS,
    longest_near=4,
)
TASKS = {task.name: task for task in (GRID, SUMS)}


@cache
def splits(task: Task) -> dict[str, list[Problem]]:
    """Training, validation (for learning rates), and held-out problems: disjoint."""
    train = task.problems(1024, seed=12345)
    validation = task.problems(128, seed=555, exclude=frozenset(train))
    heldout = task.problems(128, seed=424242, exclude=frozenset(train + validation))
    return {"train": train, "validation": validation, "heldout": heldout}


# ---- What models learn from: examples (prompt, answer) -------------------------------------------------------------------------------------


def _words(steps: list[tuple[str, int]], rng: random.Random, fillers: float) -> str:
    """Moves and states, with a filler before a share `fillers` of the moves, five at most."""
    words: list[str] = []
    for move, state in steps:
        words += [FILLER] * (rng.random() < fillers and words.count(FILLER) < 5) + [move, str(state)]
    return " ".join(words)


def shortest(problem: Problem, goal: int, rng: random.Random) -> list[tuple[str, int]]:
    """A random shortest walk to `goal`."""
    distance, state, steps = problem.distances(goal), problem.start, []
    while state != goal:
        steps.append(rng.choice([(m, to) for m, to in problem.neighbours(state) if distance[to] < distance[state]]))
        state = steps[-1][1]
    return steps


def wander(problem: Problem, rng: random.Random) -> list[tuple[str, int]]:
    """A random walk of 3 to 8 moves."""
    state, steps = problem.start, []
    for _ in range(rng.randint(3, 8)):
        steps.append(rng.choice(problem.neighbours(state)))
        state = steps[-1][1]
    return steps


def expert_example(task: Task, rng: random.Random) -> tuple[str, str]:
    """A shortest walk, with a filler before one move in five."""
    problem = task.random_problem(rng)
    return problem.prompt, _words(shortest(problem, problem.goal, rng), rng, fillers=0.2)


def aimless_example(task: Task, rng: random.Random, hindsight: float) -> tuple[str, str]:
    """A random walk; a share `hindsight` of them says, as its goal, where it ended."""
    problem = task.random_problem(rng)
    steps = wander(problem, rng)
    if rng.random() < hindsight and steps[-1][1] != problem.start:
        problem = task.problem(problem.walls, problem.start, steps[-1][1])
    return problem.prompt, _words(steps, rng, fillers=0.0)


def corpus_example(task: Task, rng: random.Random, solved: float) -> tuple[str, str]:
    """What a base model reads: mostly random walks, and a share `solved` of shortest walks, to near goals alone."""
    problem = task.random_problem(rng)
    if rng.random() >= solved:
        return problem.prompt, _words(wander(problem, rng), rng, fillers=0.0)
    while task.level(problem) == "far":
        problem = task.random_problem(rng)
    return problem.prompt, _words(shortest(problem, problem.goal, rng), rng, fillers=0.0)


def wrong_example(task: Task, rng: random.Random) -> tuple[str, str]:
    """A shortest walk to another goal than the stated one: a confident expert that is wrong."""
    problem = task.random_problem(rng)
    others = [state for state in problem.distances(problem.start) if state not in (problem.goal, problem.start)]
    return problem.prompt, _words(shortest(problem, rng.choice(others), rng), rng, fillers=0.2)
