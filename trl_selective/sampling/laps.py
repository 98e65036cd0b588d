"""How long did the device work, without making the host wait for it?"""

import time
from itertools import pairwise

import torch


class Laps:
    """A stopwatch that starts when it is made. On a GPU its marks are events in the stream of work, so that nothing waits until `seconds` is
    asked for."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._marks: list = []
        self.mark()

    def mark(self) -> None:
        """End a lap, and begin the next one."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each lap, once all work up to the last mark is done."""
        if not self._is_cuda:
            return [end - start for start, end in pairwise(self._marks)]
        self._marks[-1].synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(self._marks)]
