"""What a training step costs beside GRPOTrainer's: with guidance off, and with 4 of 12 rollouts guided."""

import argparse
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.benchmarks.timing import median_ratio, synchronize
from tests.training import GUIDED, PLAIN, length_reward, make_trainer

NUM_WARM = 3  # steps that do not count


class Turns(TrainerCallback):
    """Trainers in threads of their own that take their steps in turn, so that all meet the same machine. A step ends where the next one
    begins: its logs are part of it."""

    def __init__(self, mine: threading.Semaphore, next_one: threading.Semaphore):
        self.mine, self.next_one = mine, next_one
        self.seconds: list[float] = []
        self.start: float | None = None

    def on_step_begin(self, *_, **__):
        if self.start is not None:
            self._end_turn()
        self.mine.acquire()
        synchronize()
        self.start = time.perf_counter()

    def on_train_end(self, *_, **__):
        self._end_turn()

    def _end_turn(self) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        self.next_one.release()


class Stopwatch:
    """Seconds that a model spends in its forward."""

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
    parser.add_argument("--prompts", type=int, default=8, help="per step, with 12 rollouts each")


def main(arguments: argparse.Namespace) -> None:
    settings = {
        "max_steps": arguments.steps + NUM_WARM,
        "per_device_train_batch_size": 12 * arguments.prompts,
        "num_generations": 12,
        "learning_rate": 1e-6,
        "reward_funcs": length_reward,
    }
    guided = {**GUIDED, "num_guided_generations": 4, "guided_sampler": "auto", "guidance_steps": float("inf")}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            "GRPOTrainer": make_trainer(
                Path(folder) / "grpo", trainer_class=GRPOTrainer, config_class=GRPOConfig, settings=PLAIN, **settings
            ),
            "guidance off": make_trainer(Path(folder) / "off", settings=PLAIN, **settings),
            "4 of 12 guided": make_trainer(Path(folder) / "guided", settings=guided, **settings),
        }
        expert = Stopwatch(trainers["4 of 12 guided"].expert_model)
        turns = take_turns(trainers)
    seconds = {name: turn.seconds[NUM_WARM:] for name, turn in turns.items()}
    grpo = seconds["GRPOTrainer"]
    share = expert.seconds / sum(turns["4 of 12 guided"].seconds)
    print("\n| trainer | median step, s | ratio |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {median(values):.3f} | {median_ratio(values, grpo):.3f} |")
    without_expert = [value * (1 - share) for value in seconds["4 of 12 guided"]]
    print(
        f"| the same without the expert's forwards ({share:.0%}) | {median(without_expert):.3f} | {median_ratio(without_expert, grpo):.3f} |"
    )


def take_turns(trainers: dict[str, GRPOTrainer]) -> dict[str, Turns]:
    """Train all, a step of each in turn."""
    gates = [threading.Semaphore(int(not number)) for number in range(len(trainers))]
    turns, threads = {}, []
    for number, (name, trainer) in enumerate(trainers.items()):
        turns[name] = Turns(gates[number], gates[(number + 1) % len(gates)])
        trainer.add_callback(turns[name])
        threads.append(threading.Thread(target=trainer.train))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return turns
