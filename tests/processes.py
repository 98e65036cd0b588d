"""Several processes: simulated by threads that wait for one another, and real ones."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import trl

ROOT = Path(__file__).parents[1]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
CONFIGS = Path(trl.__file__).parent / "accelerate_configs"


def launch(folder: Path, num_processes: int, settings: dict, config: str | None = None, timeout: float = 280):
    """`several_processes.py`, alone, under torchrun, or with one of TRL's configs for Accelerate: what each process recorded, and the parameters
    that it trained."""
    folder.mkdir()
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    if config is not None:
        settings = {**settings, "on_accelerators": True}
        accumulation = settings.get("gradient_accumulation_steps", 2)  # of which zero1.yaml has a number of its own
        launcher = [
            *("accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")),
            *("--num_processes", str(num_processes), "--main_process_port", str(free_port())),
            *("--mixed_precision", "no", "--gradient_accumulation_steps", str(accumulation)),
        ]
    module = [*([*launcher, "-m"] if num_processes > 1 else []), "tests.several_processes", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [sys.executable, "-m", *module, json.dumps(settings)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert result.returncode == 0, f"{settings}: {result.stderr[-3000:]}"
    ranks = range(num_processes)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in ranks], [
        torch.load(folder / f"rank{rank}.pt") for rank in ranks
    ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


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
