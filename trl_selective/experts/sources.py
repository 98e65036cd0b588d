"""Who writes whole completions: the terms that a model in this process and one behind an endpoint share.

A source answers all prompts from a given row on, in order, one row at a time. What it draws for a row depends on the seed, the row and the
number of the completion, so that a run that was interrupted goes on as if it had not been.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from trl_selective.grading import Conversation
from trl_selective.sampling.unguided import seed_of


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; what each field means stands beside it.

    Raises:
        ValueError: for values out of range.
    """

    num_completions: int = field(default=1, metadata={"help": "Completions for each prompt."})
    max_completion_length: int = field(
        default=8192,
        metadata={"help": "Tokens of the expert at which a completion is cut off, and thus no whole one."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the expert, above 0."})
    seed: int = field(default=0, metadata={"help": "Of all that is drawn."})

    def __post_init__(self):
        for name in ("num_completions", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}.")

    def seed_of(self, *key: int) -> int:
        """A seed for a row, or for one completion of it: the same in every process and run."""
        return seed_of(self.seed, *key)


@dataclass(frozen=True)
class Completion:
    """One answer of an expert.

    Attributes:
        text: behind the prompt, without the end token.
        is_whole: whether the expert said something, which the policy (if its tokenizer is known) reads too, and came to its end by itself.
        token_ids: as drawn, of the expert's tokenizer, if known.
        logps: log pi_b of each token that a policy reads from the text, its end token included, if known.
    """

    text: str
    is_whole: bool
    token_ids: list[int] | None = None
    logps: list[float] | None = None


@runtime_checkable
class Source(Protocol):
    """An expert that answers prompts.

    Attributes:
        name: what it is called in the dataset.
        sampling: how it draws.
        settings: all that its answers depend on, for JSON.
    """

    name: str
    sampling: Sampling

    @property
    def settings(self) -> dict[str, Any]: ...

    def complete(self, prompts: Sequence[str | Conversation], first: int) -> Iterator[list[Completion]]:
        """The completions of each prompt from index `first` on, in order."""
