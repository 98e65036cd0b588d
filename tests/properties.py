"""Properties that hold for every input: a few dozen examples in the quick suite, twenty times as many under `slow`, the same in every run."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings

THOROUGH = 20


def for_all(examples: int = 60, **strategies) -> Callable:
    """The test holds for everything that the strategies draw."""

    def decorate(test: Callable) -> Callable:
        thorough = pytest.param(THOROUGH * examples, marks=pytest.mark.slow, id="thorough")

        @pytest.mark.parametrize("examples", [pytest.param(examples, id="quick"), thorough])
        def run(examples):
            drawn = given(**strategies)(test)
            settings(
                max_examples=examples,
                derandomize=True,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            )(drawn)()

        run.__doc__ = test.__doc__
        return run

    return decorate
