"""The quickstart's task: find a path through a small grid. Verifiable, with many correct answers per problem.

A problem is a 6x6 grid with 9 walls, a start and a goal, 4 to 9 steps apart. The prompt lists the walls, the start and the goal; the
answer alternates moves and the cells they lead to:

    prompt   "2 7 8 13 17 20 25 28 33 0 > 21 :"        (walls, start > goal :)
    answer   "D 6 D 12 ~ D 18 D 24 ..."                (`~` is a filler word without meaning)

Cells are numbered row by row from 0 (top left) to 35. An answer is right when every move stays on the grid and off the walls, every
announced cell is the one the move leads to, and the last cell is the goal. Two answers are the same solution when they visit the same
cells. The moves are decisions (there are often several good ones); the cells follow from them: what guidance at *uncertain* tokens is
made for.
"""

import random
from collections import deque
from dataclasses import dataclass
from functools import cache

SIDE = 6
NUM_WALLS = 9
NUM_TRAIN, NUM_HELDOUT = 1024, 128
MIN_DISTANCE, MAX_DISTANCE = 4, 9
MAX_COMPLETION_TOKENS = 26  # 10 moves with their cells, 5 fillers, the end token
MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
FILLER = "~"
WORDS = [str(cell) for cell in range(SIDE * SIDE)] + [*MOVES, ">", ":", FILLER]


@cache
def step(cell: int, move: str) -> int | None:
    """The cell that `move` leads to from `cell`, or None off the grid."""
    row, column = cell // SIDE + MOVES[move][0], cell % SIDE + MOVES[move][1]
    return row * SIDE + column if 0 <= row < SIDE and 0 <= column < SIDE else None


@dataclass(frozen=True)
class Problem:
    walls: tuple[int, ...]
    start: int
    goal: int

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.walls))} {self.start} > {self.goal} :"

    def neighbours(self, cell: int) -> list[tuple[str, int]]:
        """The legal moves from `cell`, with the cells they lead to."""
        return [(m, to) for m in MOVES if (to := step(cell, m)) is not None and to not in self.walls]

    def distances(self, origin: int) -> dict[int, int]:
        """Number of steps to `origin` from every cell that can reach it."""
        distance, queue = {origin: 0}, deque([origin])
        while queue:
            cell = queue.popleft()
            for _, to in self.neighbours(cell):
                if to not in distance:
                    distance[to] = distance[cell] + 1
                    queue.append(to)
        return distance


def random_problem(rng: random.Random) -> Problem:
    """A uniformly drawn solvable problem whose start and goal are `MIN_DISTANCE` to `MAX_DISTANCE` steps apart."""
    while True:
        *walls, start, goal = rng.sample(range(SIDE * SIDE), NUM_WALLS + 2)
        problem = Problem(tuple(sorted(walls)), start, goal)
        if MIN_DISTANCE <= problem.distances(goal).get(start, 0) <= MAX_DISTANCE:
            return problem


def problems(
    num_problems: int, seed: int, exclude: frozenset[Problem] = frozenset(), draw=random_problem
) -> list[Problem]:
    """`num_problems` distinct problems of `draw`, none of them in `exclude`; the same for the same seed."""
    rng, found = random.Random(seed), {}
    while len(found) < num_problems:
        problem = draw(rng)
        if problem not in exclude:
            found[problem] = None
    return list(found)


def train_and_heldout() -> tuple[list[Problem], list[Problem]]:
    """The quickstart's training problems and its held-out problems, disjoint."""
    train = problems(NUM_TRAIN, seed=12345)
    return train, problems(NUM_HELDOUT, seed=2026, exclude=frozenset(train))


def solution(problem: Problem, completion: str) -> tuple[int, ...] | None:
    """The cells that `completion` visits if it is a right answer, else None. Fillers are ignored."""
    words = [word for word in completion.split() if word != FILLER]
    cell, visited = problem.start, []
    if len(words) % 2:
        return None
    for move, announced in zip(words[::2], words[1::2], strict=True):
        to = dict(problem.neighbours(cell)).get(move)
        if to is None or announced != str(to):
            return None
        cell = to
        visited.append(cell)
    return tuple(visited) if cell == problem.goal and visited else None


def path_reward(completions, walls, start, goal, **kwargs) -> list[float]:
    """1 for a right answer, 0 for a wrong one: a reward function as TRL calls it."""
    rows = zip(completions, walls, start, goal, strict=True)
    return [float(solution(Problem(tuple(w), s, g), text) is not None) for text, w, s, g in rows]
