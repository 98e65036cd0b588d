"""A selector that learns which injections pay off: from features of prompt, group and completion to the later change of the prompt's success rate.

The model is Bayesian linear regression. It has no learning rate, forgets nothing, and is a sum over outcomes, so that neither their order nor the
number of processes matters. Choosing the highest mean plus one standard deviation (LinUCB, arXiv:1003.0146) tries what is unknown before it
settles.

A success rate rises for many reasons, other training among them. That is common to all completions of a prompt, and so does not touch
the choice between them.
"""

import hashlib
import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trl_selective.selection.candidates import Candidates
from trl_selective.selection.selectors import Selector

NUM_SOURCES = 32  # sources are told apart by a hash into this many features
NUM_NUMBERS = 6  # features beside them
NUM_FEATURES = NUM_NUMBERS + NUM_SOURCES
NUM_BINS = 10  # of predictions in [-1, 1], for the calibration
PRIOR_VARIANCE = 0.25  # of a change, as if seen once


def features(candidates: Candidates) -> Float[Tensor, "completions features"]:
    """One row of about unit size for each completion.

    The policy's log-probabilities are not among them: they would cost a forward pass over all candidates. `learned & learnable` has both.
    """
    mean_length = sum(map(len, candidates.rollouts)) / len(candidates.rollouts)
    share_of_new = candidates.share_of_new(3)
    values = torch.zeros(len(candidates), NUM_FEATURES, dtype=torch.float64)
    values[:, :NUM_NUMBERS] = torch.tensor(
        [
            [
                1.0,
                candidates.success_rate,
                math.log(candidates.num_prompt_tokens) / 10,
                max(-1.0, min(1.0, math.log(len(completion.token_ids) / mean_length) / 2)),
                share_of_new[index],
                min(1.0, candidates.times_injected[index] / 4),
            ]
            for index, completion in enumerate(candidates.completions)
        ],
        dtype=torch.float64,
    )
    for index, completion in enumerate(candidates.completions):
        if completion.source is not None:
            values[index, NUM_NUMBERS + _slot(completion.source)] = 1.0
    return values


@cache
def _slot(source: str) -> int:
    """The feature of a source, the same in every process and run."""
    return hashlib.sha256(source.encode()).digest()[0] % NUM_SOURCES


@dataclass
class GainModel:
    """Predicts the change of a success rate, in [-1, 1], by Bayesian linear regression.

    Attributes:
        num_features: length of a feature vector.
        precision: I + sum x x^T.
        moment: sum x y.
        num_outcomes: how many outcomes it has seen.
        sum_of_squares: sum y^2.
        bins: for each tenth of the range of predictions, their number, their sum and the sum of what came.
    """

    num_features: int = NUM_FEATURES
    precision: Float[Tensor, "features features"] = field(default=None)  # type: ignore[assignment]
    moment: Float[Tensor, "features"] = field(default=None)  # type: ignore[assignment]
    num_outcomes: int = 0
    sum_of_squares: float = 0.0
    bins: Float[Tensor, "bins 3"] = field(default=None)  # type: ignore[assignment]
    _solution: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)  # until the next outcome

    def __post_init__(self):
        if self.precision is None:
            self.precision = torch.eye(self.num_features, dtype=torch.float64)
            self.moment = torch.zeros(self.num_features, dtype=torch.float64)
            self.bins = torch.zeros(NUM_BINS, 3, dtype=torch.float64)

    def predict(
        self, features: Float[Tensor, "completions features"]
    ) -> tuple[Float[Tensor, "completions"], Float[Tensor, "completions"]]:
        """Mean of the change to expect, and the standard deviation of that mean."""
        return features @ self.coefficients, (features @ self._solved[1] * features).sum(1).sqrt()

    @property
    def coefficients(self) -> Float[Tensor, "features"]:
        """Their mean: the prediction is `features @ coefficients`."""
        return self._solved[0]

    @property
    def _solved(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the coefficients, solved for once per outcome."""
        if self._solution is None:
            self._solution = self._solve()
        return self._solution

    def _solve(self) -> tuple[Float[Tensor, "features"], Float[Tensor, "features features"]]:
        """Mean and covariance of the coefficients. The variance of an outcome is estimated from what the mean leaves unexplained."""
        inverse = torch.linalg.inv(self.precision)
        coefficients = inverse @ self.moment
        unexplained = max(0.0, self.sum_of_squares - (self.moment @ coefficients).item())
        return coefficients, inverse * (PRIOR_VARIANCE + unexplained) / (1 + self.num_outcomes)

    def update(self, features: Float[Tensor, "features"], predicted: float, change: float) -> None:
        """Learn from one outcome.

        Args:
            features: of the completion when it was injected.
            predicted: what was predicted then; it only goes into the calibration.
            change: of the success rate, in [-1, 1].
        """
        self.precision = self.precision + features.outer(features)
        self._solution = None
        self.moment = self.moment + change * features
        self.num_outcomes += 1
        self.sum_of_squares += change**2
        index = min(NUM_BINS - 1, max(0, int((predicted + 1) / 2 * NUM_BINS)))
        self.bins[index] += torch.tensor([1.0, predicted, change], dtype=torch.float64)

    def calibration_error(self) -> float:
        """Mean absolute difference between what was predicted and what came, by tenths of the predictions; NaN before the first outcome."""
        number, predicted, came = self.bins.unbind(1)
        return ((predicted - came).abs().sum() / number.sum()).item()

    def state_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it; floats survive exactly."""
        return {
            "precision": self.precision.tolist(),
            "moment": self.moment.tolist(),
            "num_outcomes": self.num_outcomes,
            "sum_of_squares": self.sum_of_squares,
            "bins": self.bins.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: if it belongs to another number of features.
        """
        loaded = {name: torch.tensor(state[name], dtype=torch.float64) for name in ("precision", "moment", "bins")}
        for name, value in loaded.items():
            if value.shape != getattr(self, name).shape:
                raise ValueError(
                    f"{name} has the shape {tuple(value.shape)}, expected {tuple(getattr(self, name).shape)}"
                )
        self.precision, self.moment, self.bins = loaded["precision"], loaded["moment"], loaded["bins"]
        self._solution = None
        self.num_outcomes, self.sum_of_squares = int(state["num_outcomes"]), float(state["sum_of_squares"])


@dataclass(frozen=True)
class Learned(Selector):
    """The one with the highest predicted change of the prompt's success rate, with a bonus for what little is known of.

    Args:
        model: what it has learnt.
        exploration: standard deviations added to the prediction.
    """

    model: GainModel = field(default_factory=GainModel)
    exploration: float = 1.0

    name = "learned"

    def scores(self, candidates: Candidates) -> list[float]:
        assert candidates.features is not None
        mean, deviation = self.model.predict(candidates.features)
        return (mean + self.exploration * deviation).tolist()

    def learners(self) -> list["Learned"]:
        return [self]
