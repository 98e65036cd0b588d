"""What a training step costs beside GRPOTrainer's: with guidance off, and with 4 of 12 rollouts guided."""

import argparse
import copy
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.benchmarks.models import SHAPES, Disagreement, make_expert, make_policy
from tests.benchmarks.timing import median_ratio, synchronize
from tests.training import GUIDED, PLAIN, POLICY, length_reward, make_trainer
from trl_selective.config import SAMPLERS

NUM_WARM = 3  # steps that do not count


class Turns(TrainerCallback):
    """Trainers in threads of their own that take their steps in turn, so that all meet the same machine. A step ends where the next one
    begins: its logs are part of it."""

    def __init__(self, mine: threading.Semaphore, next_one: threading.Semaphore, failures: list[BaseException]):
        self.mine, self.next_one, self.failures = mine, next_one, failures
        self.seconds: list[float] = []
        self.start: float | None = None

    def on_step_begin(self, *_, **__):
        if self.start is not None:
            self._end_turn()
        self.mine.acquire()
        if self.failures:
            raise RuntimeError("another trainer has failed")
        synchronize()
        self.start = time.perf_counter()

    def on_train_end(self, *_, **__):
        self._end_turn()

    def _end_turn(self) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        self.next_one.release()


class Stopwatch:
    """Seconds that a model spends in its forward. Not for accelerators, where forwards are graphs, which a clock would break up."""

    def __init__(self, model):
        self.seconds = 0.0
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._stop)

    def _start(self, *_):
        synchronize()
        self.seconds -= time.perf_counter()

    def _stop(self, *_):
        synchronize()
        self.seconds += time.perf_counter()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=4, help="per step, with 12 rollouts each")
    parser.add_argument("--length", type=int, default=64, help="of completions")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of policy and expert")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rejected", type=float, default=0.05, metavar="SHARE", help="w TV")
    parser.add_argument("--sampler", choices=SAMPLERS, default="auto")


def main(arguments: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    shape = replace(SHAPES[arguments.shape], vocab_size=len(tokenizer))
    policy = make_policy(shape, arguments.device)
    expert = make_expert(policy, times=1)
    agreement = Disagreement(policy, expert).set(arguments.rejected)
    settings = {
        "max_steps": arguments.steps + NUM_WARM,
        "max_completion_length": arguments.length,
        "per_device_train_batch_size": 12 * arguments.prompts,
        "num_generations": 12,
        "learning_rate": 1e-9,
        "use_cpu": arguments.device == "cpu",
        "reward_funcs": length_reward,
    }
    init = {"processing_class": tokenizer}
    guided = {
        **GUIDED,
        "num_guided_generations": 4,
        "guided_sampler": arguments.sampler,
        "guidance_steps": float("inf"),
        "entropy_threshold_init": agreement.entropy_threshold,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: make_trainer(Path(folder) / name, model=copy.deepcopy(policy), **{"init": init, **kind}, **settings)
            for name, kind in {
                "GRPOTrainer": {"trainer_class": GRPOTrainer, "config_class": GRPOConfig, "settings": PLAIN},
                "guidance off": {"settings": PLAIN},
                "4 of 12 guided": {
                    "settings": guided,
                    "expert_model": expert,
                    "init": {**init, "expert_processing_class": tokenizer},
                },
            }.items()
        }
        stopwatch = Stopwatch(expert) if arguments.device == "cpu" else None
        turns = take_turns(trainers)
    seconds = {name: turn.seconds[NUM_WARM:] for name, turn in turns.items()}
    grpo = seconds["GRPOTrainer"]
    print("\n| trainer | median step, s | ratio |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {median(values):.3f} | {median_ratio(values, grpo):.3f} |")
    if stopwatch:
        share = stopwatch.seconds / sum(turns["4 of 12 guided"].seconds)
        without_expert = [value * (1 - share) for value in seconds["4 of 12 guided"]]
        print(
            f"| the same without the expert's forwards ({share:.0%}) | {median(without_expert):.3f} | {median_ratio(without_expert, grpo):.3f} |"
        )


def take_turns(trainers: dict[str, GRPOTrainer]) -> dict[str, Turns]:
    """Train all, a step of each in turn."""
    gates = [threading.Semaphore(int(not number)) for number in range(len(trainers))]
    failures: list[BaseException] = []

    def train(trainer: GRPOTrainer) -> None:
        try:
            trainer.train()
        except BaseException as error:  # noqa: BLE001  it is raised below
            failures.append(error)
            for gate in gates:  # nobody has to wait for a turn that never ends
                gate.release()

    turns, threads = {}, []
    for number, (name, trainer) in enumerate(trainers.items()):
        turns[name] = Turns(gates[number], gates[(number + 1) % len(gates)], failures)
        trainer.add_callback(turns[name])
        threads.append(threading.Thread(target=train, args=(trainer,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return turns
