"""The study: guidance methods compared at the same rollouts, updates and learning-rate search, over seeds and tasks.

    python recipes/study/run.py                  # all of study.yaml: hours on two CPU cores
    python recipes/study/run.py --quick          # every method once, for seconds: shows that all works, not what works
    python recipes/study/run.py --comparisons grid --arms grpo mentor --seeds 0
    python recipes/study/run.py --settings recipes/study/larger.yaml --output_dir outputs/larger    # larger models, for a GPU

Everything is made from nothing: models first, then the expert's completions, then the search for learning rates, then the runs, in
`--workers` processes. Each model and each run is written when it is done, and not done again: after an interruption, the same command goes
on. At the end, and with `--report_only`, tables and pictures are made of all runs that are there.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are slower with more
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_MININTERVAL", "2")
sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))  # also for the worker processes

import yaml
from models import RECIPES
from report import report
from tasks import TASKS
from tqdm import tqdm
from training import Run, collect_completions, execute, make_model, measure_model

HERE = Path(__file__).parent
QUICK: dict[str, Any] = {
    "training": {"max_steps": 4, "per_device_train_batch_size": 16, "warmup_steps": 1},
    "protocol": {"num_problems": 8, "final_samples": 64, "measure_every": 2, "curve_samples": 2},
    "search": {"learning_rates": [3.0e-4, 1.0e-3], "seeds": [100], "final_samples": 2},
}
QUICK_ARMS = ["grpo", "sft", "sft_then_grpo", "hints", "luffy", "mentor", "random_positions", "selected", "both"]
NUM_TRAIN, QUICK_NUM_TRAIN, QUICK_MODEL_STEPS = 1024, 64, 20


class Study:
    """What `study.yaml` says, as runs."""

    def __init__(self, settings: dict[str, Any], arguments: argparse.Namespace):
        quick: dict[str, Any] = QUICK if arguments.quick else {}
        self.model: dict[str, int] = settings["model"]
        self.training = settings["training"] | quick.get("training", {})
        self.protocol = settings["protocol"] | quick.get("protocol", {})
        self.search = settings["search"] | quick.get("search", {})
        self.seeds: list[int] = arguments.seeds or ([0] if quick else settings["seeds"])
        self.groups = {arm: group for group, arms in settings["arms"].items() for arm in arms}
        self.changes = {arm: changes for arms in settings["arms"].values() for arm, changes in arms.items()}
        self.comparisons = settings["comparisons"]
        self.wanted = arguments.comparisons or list(self.comparisons)[: 1 if arguments.quick else None]
        self.chosen = arguments.arms or (QUICK_ARMS if arguments.quick else list(self.changes))
        for names, known in ((self.wanted, self.comparisons), (self.chosen, self.changes)):
            if unknown := set(names) - set(known):
                raise SystemExit(f"The settings have no {sorted(unknown)}, only {list(known)}.")

    def arms_of(self, comparison: str) -> list[str]:
        listed = self.comparisons[comparison]["arms"]
        return [arm for arm in self.changes if arm in self.chosen and (listed == "all" or arm in listed)]

    def rate_of(self, comparison: str, arm: str) -> tuple[str, str]:
        """Where and for which arm the learning rate was searched that an arm has: a variant has that of the arm it varies."""
        group = self.groups[arm]
        return self.comparisons[comparison].get("rates_of", comparison), arm if group == "main" else group

    def searches(self) -> list[Run]:
        """The runs on validation problems that the learning rates of `runs` are chosen by."""
        searched = dict.fromkeys(self.rate_of(place, arm) for place in self.wanted for arm in self.arms_of(place))
        return [
            self._run(comparison, arm, seed, rate, "validation")
            for comparison, arm in searched
            for seed in self.search["seeds"]
            for rate in self.search["learning_rates"]
        ]

    def runs(self, rates: dict[tuple[str, str], float]) -> list[Run]:
        """Of each comparison all arms with one seed, then with the next."""
        return [
            self._run(comparison, arm, seed, rates[self.rate_of(comparison, arm)], "heldout")
            for comparison in self.wanted
            for seed in self.seeds
            for arm in self.arms_of(comparison)
        ]

    def models(self) -> list[tuple[str, str]]:
        """(task, model) of all that runs start from or are guided by."""
        needed = []
        for run in [*self.searches(), *self.runs(defaultdict(float))]:
            needed += [(run.task, name) for name in ("expert", run.base, run.settings.get("expert", "expert"))]
        return list(dict.fromkeys(needed))

    def _run(self, comparison: str, arm: str, seed: int, learning_rate: float, split: str) -> Run:
        place, protocol, training = self.comparisons[comparison], self.protocol, self.training
        if split == "validation":
            protocol = protocol | {"final_samples": self.search["final_samples"], "measure_every": 10**9}
        if "max_steps" in place:
            training = training | {"max_steps": place["max_steps"]}
        return Run(
            comparison=comparison,
            task=place["task"],
            base=place["base"],
            arm=arm,
            seed=seed,
            learning_rate=learning_rate,
            split=split,
            num_train=place.get("num_train", NUM_TRAIN),
            settings=self.changes[arm],
            training=training,
            protocol=protocol,
        )


def done(run: Run, output: Path) -> bool:
    """Whether a run's result is there. One of other settings is refused, not overwritten."""
    path = output / "results" / f"{run.name}.json"
    if not path.exists():
        return False
    result, wanted = json.loads(path.read_text()), json.loads(json.dumps(asdict(run)))
    if different := [key for key, value in wanted.items() if result[key] != value]:
        raise SystemExit(
            f"{path} was made with other {', '.join(different)} than the settings and the command line say now. Remove it to have it made anew, or "
            "choose another --output_dir."
        )
    return True


def carry_out(pool: ProcessPoolExecutor, what: str, jobs: list[tuple]) -> None:
    """Do all jobs, (function, *arguments). The first that fails ends the study; what is done stays."""
    futures = [pool.submit(*job) for job in jobs]
    for future in tqdm(as_completed(futures), total=len(futures), desc=what):
        if (error := future.exception()) is not None:
            pool.shutdown(cancel_futures=True)
            log = getattr(error, "__notes__", ["none, its process died"])[0]
            raise SystemExit(f"One of the {what} failed: {error!r}. Log: {log}. What is done is kept.") from error


def best_rates(study: Study, output: Path) -> dict[tuple[str, str], float]:
    """(comparison, arm) -> the learning rate with the most right answers to validation problems."""
    right: dict[tuple[str, str], Counter[float]] = defaultdict(Counter)
    for run in study.searches():
        found = json.loads((output / "results" / f"{run.name}.json").read_text())
        right[run.comparison, run.arm][run.learning_rate] += sum(found["final"]["num_correct"])
    return {place: counts.most_common(1)[0][0] for place, counts in right.items()}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"))
    parser.add_argument(
        "--settings", type=Path, help="a file whose sections take the place of those of study.yaml: another study"
    )
    parser.add_argument("--comparisons", nargs="+", help="out of study.yaml; default: all")
    parser.add_argument("--arms", nargs="+", help="out of study.yaml; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of study.yaml")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, each with one run at a time")
    parser.add_argument(
        "--quick", action="store_true", help="every method, for a few steps of nearly untrained models"
    )
    parser.add_argument("--report_only", action="store_true", help="only make tables and pictures of what is there")
    return parser


def read_settings(changes: Path | None) -> dict[str, Any]:
    """What `study.yaml` says, or a file that changes some of its sections."""
    settings = yaml.safe_load((HERE / "study.yaml").read_text())
    if changes is None:
        return settings
    changed = yaml.safe_load(changes.read_text())
    if unknown := set(changed) - set(settings):
        raise SystemExit(f"{changes} has sections that study.yaml lacks: {sorted(unknown)}. It has {list(settings)}.")
    return settings | changed


def main() -> None:
    arguments = parser().parse_args()
    settings = read_settings(arguments.settings)
    study = Study(settings, arguments)
    output = arguments.output_dir.resolve() / ("quick" if arguments.quick else "")

    if not arguments.report_only:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
            model_steps, num_train = (QUICK_MODEL_STEPS, QUICK_NUM_TRAIN) if arguments.quick else (None, NUM_TRAIN)
            names = study.models()
            for start in (False, True):  # first those that others start from
                wave = [(task, name) for task, name in names if (RECIPES[name].start is not None) == start]
                carry_out(
                    pool,
                    "models",
                    [(make_model, TASKS[task], name, output, study.model, model_steps) for task, name in wave],
                )
            experts = [(task, name) for task, name in names if name.endswith("expert")]
            carry_out(
                pool, "expert completions", [(collect_completions, TASKS[t], n, output, num_train) for t, n in experts]
            )
            carry_out(
                pool, "measures of models", [(measure_model, TASKS[t], n, output, study.protocol) for t, n in names]
            )
            searches = [run for run in study.searches() if not done(run, output)]
            carry_out(pool, "learning rates", [(execute, run, output) for run in searches])
            runs = [run for run in study.runs(best_rates(study, output)) if not done(run, output)]
            carry_out(pool, "runs", [(execute, run, output) for run in runs])
    print(report(output / "results", settings))
    print(f"\nTables, pictures and the results of all runs are in {output / 'results'}")


if __name__ == "__main__":
    main()
