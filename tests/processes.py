"""Several processes, simulated by threads that wait for one another; and the end of a real one."""

import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import torch


def leave() -> NoReturn:
    """End this process here and now. While Python shuts down, a thread of gloo that drops the last tensor of a collective operation waits for
    the interpreter in vain and aborts (in 1 of 20 runs, also after `destroy_process_group`), which the launcher takes for a failure."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Processes:
    """Collective operations among threads, each of them a process."""

    def __init__(self, num: int):
        self.num, self.parts, self.barrier = num, {}, threading.Barrier(num)

    def exchange(self, rank: int, part: Any) -> list[Any]:
        """What each process gives, in their order."""
        self.parts[rank] = part
        self.barrier.wait(timeout=30)
        parts = [self.parts[other] for other in range(self.num)]
        self.barrier.wait(timeout=30)
        return parts

    def sum_for(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """An all-reduce."""
        return lambda tensor: sum(self.exchange(rank, tensor))

    def gather_for(self, rank: int) -> Callable[[list], list]:
        """Joins lists, as `accelerate.utils.gather_object` does."""
        return lambda part: [entry for entries in self.exchange(rank, part) for entry in entries]

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """The results of `work(rank)` on all processes at the same time. If one fails, so do all."""
        results: list[Any] = [None] * self.num
        errors: list[BaseException] = []

        def target(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except BaseException as error:  # noqa: BLE001  raised again in the main thread
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=target, args=(rank,)) for rank in range(self.num)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        if errors:
            raise errors[0]
        assert not any(thread.is_alive() for thread in threads), "a process waits for another one"
        return results
