"""gamma_p while training (arXiv:2510.04140, section 3): measured on one batch, used for the next, equal on all processes, kept in checkpoints."""

from collections.abc import Callable

from torch import Tensor

from trl_selective.functional.thresholds import NUM_BINS, EntropyHistogram


class EntropyThreshold:
    """The entropy in nats from which on a token counts as uncertain: a quantile of the policy's own token entropies.

    Args:
        vocab_size: of the policy's head.
        quantile: in [0, 1].
        init: value before the first measurement; None if there is none until then.
        floor: lower bound of a measured value.
        sum_over_processes: adds a tensor up over all processes.

    Attributes:
        value: the threshold, or None.
        histogram: entropies of this process since the last measurement.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        quantile: float,
        init: float | None,
        floor: float,
        sum_over_processes: Callable[[Tensor], Tensor],
    ):
        self.vocab_size = vocab_size
        self.quantile = quantile
        self.value = init
        self.floor = floor
        self.sum_over_processes = sum_over_processes
        self.histogram = EntropyHistogram(vocab_size)

    def measure(self) -> float | None:
        """Take the entropies seen since the last call into account. All processes call this together."""
        total = EntropyHistogram(self.vocab_size, counts=self.sum_over_processes(self.histogram.counts))
        measured = total.quantile(self.quantile)
        if measured is not None:
            self.value = max(measured, self.floor)
            self.histogram = EntropyHistogram(self.vocab_size)
        return self.value

    def state_dict(self) -> dict:
        """The state of all processes. All of them call this together."""
        counts = self.sum_over_processes(self.histogram.counts)
        seen = counts.nonzero().squeeze(1).tolist()
        return {
            "entropy_threshold": self.value,
            "entropy_counts": {str(index): counts[index].item() for index in seen},
        }

    def load_state_dict(self, state: dict, *, is_main_process: bool) -> None:
        """Continue from `state_dict()`. The main process alone takes over the counts, which are those of all.

        Raises:
            ValueError: if a count is out of range.
        """
        value = state["entropy_threshold"]
        counts = {int(index): int(count) for index, count in state["entropy_counts"].items()}
        if not all(0 <= index < NUM_BINS and count >= 0 for index, count in counts.items()):
            raise ValueError("counts out of range")
        self.value = None if value is None else float(value)
        self.histogram = EntropyHistogram(self.vocab_size)
        if is_main_process:
            for index, count in counts.items():
                self.histogram.counts[index] = count
