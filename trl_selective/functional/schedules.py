"""How strong is guidance at which step? A schedule is a function step -> value; `join` strings schedules together.

The paper (arXiv:2510.04140) anneals alpha by a cosine from 1 to 0 over 120 of 200 steps and generates nothing guided afterwards:
`cosine(1.0, 0.0, steps=120)`. With `steps=inf` a schedule stays where it starts.
"""

import math
from collections.abc import Callable, Sequence

Schedule = Callable[[float], float]


def constant(value: float) -> Schedule:
    """`value` at every step."""
    return lambda step: value


def linear(start: float, end: float, steps: float) -> Schedule:
    """Straight from `start` at step 0 to `end` at `steps`, and `end` from then on (at once if `steps` is 0)."""
    return lambda step: end if step >= steps else start + (end - start) * step / steps


def cosine(start: float, end: float, steps: float) -> Schedule:
    """Half a cosine from `start` at step 0 to `end` at `steps`, and `end` from then on (at once if `steps` is 0)."""
    return lambda step: end if step >= steps else end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / steps))


def join(schedules: Sequence[Schedule], boundaries: Sequence[float]) -> Schedule:
    """`schedules[0]` before `boundaries[0]`, then `schedules[1]`, and so on. Each counts its steps from its own boundary.

    Raises:
        ValueError: unless there is one boundary fewer than schedules, in ascending order.

    Example:
        >>> warm = join([constant(0.0), linear(0.0, 1.0, steps=10)], boundaries=[5])
        >>> [warm(step) for step in (0, 4, 5, 10, 15, 99)]
        [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
    """
    if len(boundaries) != len(schedules) - 1 or list(boundaries) != sorted(boundaries):
        raise ValueError(
            f"join needs one ascending boundary fewer than schedules, got {len(schedules)} schedules and boundaries {list(boundaries)}."
        )

    def schedule(step: float) -> float:
        index = sum(step >= boundary for boundary in boundaries)
        return schedules[index](step - (boundaries[index - 1] if index else 0))

    return schedule
