"""What one generation batch of one process collects between its prompts and its advantages. Knows nothing of TRL."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from trl_selective.functional.importance import guided_importance_weight
from trl_selective.injection import Choice, Injection
from trl_selective.rollout import GuidedRollout


@dataclass
class GuidedBatch:
    """A batch whose groups lie one after another, each with its guided rows last.

    Attributes:
        coef: alpha of this batch.
        entropy_threshold: gamma_p of this batch, nats; None if no row is guided.
        num_generations: rows of a group.
        num_guided: of these, the last ones, are guided.
        num_rows: of this process; whole groups.
        completion_ids: of all rows, once they are generated.
        rollout: the record of the guided rows, in order.
        sampled_rewards_per_func: (rows of all processes, functions), NaN where a function returned None.
        rewards_per_func: the same, with those of injected completions in their places.
        rows: dataset rows of this process.
        injection: what was injected, once it is decided.
    """

    coef: float
    entropy_threshold: float | None
    num_generations: int
    num_guided: int
    num_rows: int
    completion_ids: list[list[int]] = field(default_factory=list)
    rollout: GuidedRollout | None = None
    sampled_rewards_per_func: Tensor | None = None
    rewards_per_func: Tensor | None = None
    rows: list[dict] = field(default_factory=list)
    injection: Injection | None = None

    def __post_init__(self):
        assert self.num_rows % self.num_generations == 0, "a group is split over processes"

    @property
    def num_on_policy(self) -> int:
        """On-policy rows of a group."""
        return self.num_generations - self.num_guided

    @property
    def is_guided(self) -> list[bool]:
        """For each row of this process."""
        group = [False] * self.num_on_policy + [True] * self.num_guided
        return group * (self.num_rows // self.num_generations)

    @property
    def guided_rows(self) -> list[int]:
        """The guided rows of this process."""
        return [row for row, is_guided in enumerate(self.is_guided) if is_guided]

    def split(self, rows: list) -> tuple[list, list]:
        """`rows` by kind: on-policy ones, guided ones."""
        pairs = list(zip(rows, self.is_guided, strict=True))
        return [row for row, is_guided in pairs if not is_guided], [row for row, is_guided in pairs if is_guided]

    def merge(self, on_policy: list, guided: list) -> list:
        """The inverse of `split`."""
        sources = iter(on_policy), iter(guided)
        return [next(sources[is_guided]) for is_guided in self.is_guided]

    def expert_drawn_shares(self) -> list[float]:
        """Share of the tokens of each row that the expert drew."""
        if self.rollout is None:
            return [0.0] * self.num_rows
        guided = [sum(row) / len(row) for row in self.rollout.expert_drawn]
        return self.merge([0.0] * (self.num_rows - len(guided)), guided)

    def inject(self, injection: Injection) -> None:
        """Note what was injected, and put its rewards in the places of those that it replaces."""
        self.injection, self.rewards_per_func = injection, self.sampled_rewards_per_func.clone()
        for choice in injection.injected:
            self.rewards_per_func[choice.row] = torch.tensor(choice.rewards_per_func)

    def injected(self, process_index: int) -> dict[int, Choice]:
        """What is injected into rows of this process, by row."""
        first = process_index * self.num_rows
        choices = self.injection.injected if self.injection else []
        return {choice.row - first: choice for choice in choices if first <= choice.row < first + self.num_rows}

    def importance_weights(self, seq: int, correction: str, max_ratio: float) -> Float[Tensor, "rows #{seq}"]:
        """Weights under `correction` of all rows, one per token of `seq` or one per row; 1 for what is not guided. A guided row may be longer
        than `seq` where an expert completion has taken its place."""
        log_ratio, mask = torch.zeros(self.num_rows, seq), torch.zeros(self.num_rows, seq, dtype=torch.bool)
        for row, ratios in zip(self.guided_rows, self.rollout.log_ratios(), strict=True):
            log_ratio[row, : len(ratios)] = ratios[:seq]
            mask[row, : len(ratios)] = True
        return guided_importance_weight(log_ratio, mask, correction, max_ratio)
