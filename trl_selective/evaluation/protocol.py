"""How a model is asked: how often, at which temperature, and with which random numbers."""

from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trl_selective.sampling.unguided import seed_of


@dataclass(frozen=True)
class SamplingProtocol:
    """How completions are drawn.

    Attributes:
        num_samples: completions of each problem.
        temperature: >= 0; at 0 the most likely token is taken.
        top_p: in (0, 1], of nucleus sampling.
        max_completion_length: tokens at which a completion is cut off.
        seed: of all that is drawn.

    Raises:
        ValueError: for values out of range, and for several samples that would all be the same.
    """

    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_completion_length: int = 8192  # the paper's
    seed: int = 0

    def __post_init__(self):
        for name, is_possible, expected in (
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("max_completion_length", self.max_completion_length >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0, and at most 1"),
        ):
            if not is_possible:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}.")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"At temperature 0 all of num_samples={self.num_samples} completions of a problem would be the same. Set temperature, or "
                "num_samples=1."
            )

    def seed_of(self, problem: int, sample: int) -> int:
        """A seed for one completion: the same in every process and run, whatever was drawn before."""
        return seed_of(self.seed, problem, sample)

    @property
    def default_ks(self) -> list[int]:
        """1, 2, 4, ... up to the number of samples, and that."""
        powers = [2**i for i in range(self.num_samples.bit_length()) if 2**i < self.num_samples]
        return [*powers, self.num_samples]


def check_problems(dataset: Dataset) -> None:
    """Refuse a dataset that asks nothing.

    Raises:
        ValueError: if it has no rows, or no column `prompt`.
    """
    if not len(dataset) or "prompt" not in dataset.column_names:
        raise ValueError(
            f"Expected problems with a column 'prompt', got {len(dataset)} rows with columns {dataset.column_names}."
        )


def check_batches(tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
    """Refuse batches that cannot be made.

    Raises:
        ValueError: without a token to pad with, or without rows.
    """
    if tokenizer.pad_token_id is None or batch_size < 1:
        raise ValueError(
            f"Batches need a padding token and at least one row, got {tokenizer.pad_token_id} and batch_size={batch_size}. Set the "
            "tokenizer's `pad_token`, for instance to its `eos_token`."
        )
