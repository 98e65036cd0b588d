"""Faults that the tests have to find: `python -m tests.mutations` puts each into a copy of the package and runs the tests."""

from tests.mutations.engines import ENGINES
from tests.mutations.functional import FUNCTIONAL
from tests.mutations.injection import INJECTION
from tests.mutations.sampling import SAMPLING
from tests.mutations.training import TRAINING

ALL_MUTATIONS = [*FUNCTIONAL, *SAMPLING, *ENGINES, *INJECTION, *TRAINING]
