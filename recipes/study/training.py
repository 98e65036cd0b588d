"""One run of the study: a base model, trained by one arm's method with one seed, and measured on the way and at the end."""

import contextlib
import json
import random
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from costs import TOKENS
from measures import as_dataset, greedy, measure
from models import make
from tasks import TASKS, Problem, Task, splits
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_selective import SelectiveGuidanceGRPOConfig, SelectiveGuidanceGRPOTrainer
from trl_selective.experts import LocalSource, Sampling, accelerator_or_cpu, collect
from trl_selective.functional.schedules import cosine
from trl_selective.grading import Verifier
from trl_selective.resuming import write_whole

OWN_SETTINGS = (
    "method",
    "expert",
    "only_right",
    "sft_share",
    "hint_steps",
)  # of arms; all others are fields of the trainer's config
LOGGED = (
    "reward",
    "entropy",
    "completions/mean_length",
    "frac_reward_zero_std",
    "guidance/coef",
    "guidance/weight",
    "guidance/expert_drawn",
    "guidance/entropy_threshold",
    "guidance/reward/guided",
    "guidance/rescued_groups",
    "guidance/injection/rows",
    "guidance/injection/accepted",
)


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        comparison: in which it takes part.
        arm, settings: name of the arm, and what it changes: `OWN_SETTINGS`, else fields of SelectiveGuidanceGRPOConfig.
        num_train: how many training problems there are.
        split: which problems it is measured on: `heldout`, or `validation` while learning rates are searched.
        training: fields that all runs share.
        protocol: how it is measured, see `study.yaml`.
    """

    comparison: str
    task: str
    base: str
    arm: str
    seed: int
    learning_rate: float
    split: str
    num_train: int
    settings: dict[str, Any]
    training: dict[str, Any]
    protocol: dict[str, Any]

    @property
    def name(self) -> str:
        if self.split == "validation":
            return f"search/{self.comparison}/{self.arm}-{self.learning_rate:g}-{self.seed}"
        return f"runs/{self.comparison}/{self.arm}-{self.seed}"


@contextlib.contextmanager
def quiet(log_file: Path):
    """What is printed goes to a file: several processes share the screen."""
    torch.set_num_threads(1)  # models this small are slower with more, and sums have one order
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            error.add_note(str(log_file))
            raise


def execute(run: Run, output: Path) -> None:
    """Train and measure. The result is written to `output/results/NAME.json`, what was printed to `output/logs/NAME.log`."""
    with quiet(output / "logs" / f"{run.name}.log"):
        result = asdict(run) | _train_and_measure(run, output)
    _write(output / "results" / f"{run.name}.json", result)


def _train_and_measure(run: Run, output: Path) -> dict:
    task, protocol = TASKS[run.task], run.protocol
    tokenizer = AutoTokenizer.from_pretrained(output / "models" / run.task / run.base)
    problems = splits(task)[run.split][: protocol["num_problems"]]
    meter = Meter(task, tokenizer, problems, protocol)
    started = time.perf_counter()
    phases = _phases(run, task, output, tokenizer, meter)
    seconds = time.perf_counter() - started - meter.seconds
    costs = _costs(phases, _mean_length(run, output))
    rows = run.training["per_device_train_batch_size"]
    return _final(phases[-1].model, tokenizer, task, problems, protocol) | {
        "curve": meter.curve,
        "log": _columns(_logged(phases), LOGGED),
        "cost": {part: rows * sum(each[part] for each in costs) for part in TOKENS} | {"seconds": seconds},
        "cost_by_update": _columns(costs, (*TOKENS, "seconds")),
    }


def make_model(task: Task, name: str, output: Path, size: dict[str, int], steps: int | None = None) -> None:
    """Train a model, if it is not there."""
    with quiet(output / "logs" / "models" / f"{task.name}-{name}.log"):
        make(task, name, output / "models", size, steps)


def collect_completions(task: Task, expert: str, output: Path, number: int) -> None:
    """Four completions of the expert for each of so many training problems, with their verdicts, in `output/data`."""
    asked = Sampling(num_completions=4, max_completion_length=task.max_completion_length)
    with quiet(output / "logs" / "data" / f"{task.name}-{expert}.log"):
        model, tokenizer = _load(task, expert, output)
        source = LocalSource(model, tokenizer, expert, asked, policy_tokenizer=tokenizer, batch_size=256)
        rows = as_dataset(splits(task)["train"][:number])
        collect(rows, source, Verifier([task.reward]), output / "data" / task.name / f"{expert}.jsonl")


def measure_model(task: Task, name: str, output: Path, protocol: dict) -> None:
    """Measure a model as it is, as the end of a run is measured, into `output/results/models`, if it is not there."""
    path = output / "results" / "models" / task.name / f"{name}.json"
    if path.exists():
        return
    problems = splits(task)["heldout"][: protocol["num_problems"]]
    with quiet(output / "logs" / "measures" / f"{task.name}-{name}.log"):
        model, tokenizer = _load(task, name, output)
        result = _final(model, tokenizer, task, problems, protocol)
    _write(path, result)


def _load(task: Task, name: str, output: Path):
    folder = output / "models" / task.name / name
    return AutoModelForCausalLM.from_pretrained(folder).to(accelerator_or_cpu()), AutoTokenizer.from_pretrained(folder)


def _final(model, tokenizer, task: Task, problems: list[Problem], protocol: dict) -> dict:
    samples = {"num_samples": protocol["final_samples"], "seed": protocol["eval_seed"]}
    found = measure(model, tokenizer, task, problems, **samples)
    return {
        "final": found | {"greedy": greedy(model, tokenizer, task, problems)},
        "levels": [task.level(problem) for problem in problems],
    }


def _write(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result, separators=(",", ":")))


class Meter(TrainerCallback):
    """Measures the policy on its problems every few steps, beside training: random numbers are left as they were."""

    def __init__(self, task: Task, tokenizer, problems: list[Problem], protocol: dict):
        self.task, self.tokenizer, self.problems, self.protocol = task, tokenizer, problems, protocol
        self.curve: list[dict] = []
        self.first_step, self.seconds = 0, 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self.curve:
            self._measure(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step = self.first_step + state.global_step
        if step % self.protocol["measure_every"] == 0:
            self._measure(step, model)

    def _measure(self, step: int, model) -> None:
        started = time.perf_counter()
        samples = {"num_samples": self.protocol["curve_samples"], "seed": self.protocol["eval_seed"] + 1}
        found = measure(model, self.tokenizer, self.task, self.problems, **samples)
        pass_at_1 = sum(found["num_correct"]) / (found["num_samples"] * len(self.problems))
        shown = {name: found[name] for name in ("entropy", "length", "filler", "shortest")}
        self.curve.append({"step": step, "pass@1": pass_at_1, **shown})
        self.seconds += time.perf_counter() - started


def _phases(run: Run, task: Task, output: Path, tokenizer, meter: Meter) -> list:
    """The trainers of the run, after training, in their order."""
    changes = dict(run.settings)
    own = {name: changes.pop(name) for name in OWN_SETTINGS if name in changes}
    settings = {
        **run.training,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "output_dir": str(output / "trainer" / run.name),
        **changes,
    }
    model = str(output / "models" / run.task / run.base)
    expert = str(output / "models" / run.task / own.get("expert", "expert"))
    rows = _rows(run, output)
    if own.get("only_right"):
        rows = rows.map(lambda row: {"expert_completions": _right(row)}, load_from_cache_file=False)
    method = own.get("method", "grpo")
    if method == "sft":
        return [_sft(model, tokenizer, rows, settings, meter)]
    if method == "sft_then_grpo":
        sft_steps = round(own["sft_share"] * settings["max_steps"])
        first = _sft(model, tokenizer, rows, settings | {"max_steps": sft_steps}, meter)
        meter.first_step = sft_steps
        settings["max_steps"] -= sft_steps
        return [first, _grpo(first.model, expert, tokenizer, task, rows, settings, meter)]
    if method == "hints":
        rows = _hinted(rows, settings, own["hint_steps"], run.seed)
        settings["shuffle_dataset"] = False
    return [_grpo(model, expert, tokenizer, task, rows, settings, meter)]


def _rows(run: Run, output: Path) -> datasets.Dataset:
    """The training problems with completions of the run's expert."""
    path = output / "data" / run.task / f"{run.settings.get('expert', 'expert')}.jsonl"
    return datasets.Dataset.from_list([json.loads(line) for line in path.open()][: run.num_train])


def _right(row: dict) -> list[str]:
    """The expert's right answers to a problem."""
    answers = zip(row["expert_completions"], row["expert_rewards"], strict=True)
    return [answer for answer, reward in answers if reward > 0.5]


def _grpo(model, expert: str, tokenizer, task: Task, rows, settings: dict, meter: Meter):
    """GRPO, guided by the expert in a folder where the settings say so."""
    args = SelectiveGuidanceGRPOConfig(**settings, max_completion_length=task.max_completion_length)
    trainer = SelectiveGuidanceGRPOTrainer(
        model=model,
        expert_model=expert if args.num_guided_generations else None,
        reward_funcs=task.reward,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[meter],
    )
    trainer.train()
    return trainer


def _sft(model: str, tokenizer, rows: datasets.Dataset, settings: dict, meter: Meter) -> SFTTrainer:
    """Supervised training on the expert's right answers; as many of them in an update as there are rollouts in one of GRPO."""
    names = SFTConfig.__dataclass_fields__
    answers = [{"prompt": row["prompt"], "completion": f" {answer}"} for row in rows for answer in _right(row)]
    if not answers:
        raise ValueError(
            "The expert has no right answer to any problem: there is nothing to train on. Train it longer."
        )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**{name: value for name, value in settings.items() if name in names}, max_length=None),
        train_dataset=datasets.Dataset.from_list(answers),
        processing_class=tokenizer,
        callbacks=[meter],
    )
    trainer.train()
    return trainer


def _hinted(rows: datasets.Dataset, settings: dict, hint_steps: int, seed: int) -> datasets.Dataset:
    """
    The prompts of all updates, in their order. With a probability that falls as alpha does, a prompt goes on with the first half of a
    right answer of the expert, for all rollouts of its group.
    """
    rng, coef = random.Random(seed), cosine(1.0, 0.0, hint_steps)
    per_step = settings["per_device_train_batch_size"] // settings["num_generations"]
    prompts: list[str] = []
    order: list[dict] = []
    while len(prompts) < settings["max_steps"] * per_step:
        order = order or rng.sample(list(rows), len(rows))
        row = order.pop()
        right, hint = _right(row), ""
        if right and rng.random() < coef(len(prompts) // per_step):
            words = rng.choice(right).split()
            states = [index for index, word in enumerate(words) if word.isdigit()]
            hint = " " + " ".join(words[: states[len(states) // 2 - 1] + 1])
        prompts.append(row["prompt"] + hint)
    return datasets.Dataset.from_dict({"prompt": prompts})


def _logged(phases: list) -> list[dict]:
    """What was logged at each update."""
    return [entry for trainer in phases for entry in trainer.state.log_history if "train_runtime" not in entry]


def _columns(entries: list[dict], names: tuple[str, ...]) -> dict[str, list]:
    """The values of each name by update, to four digits; only of names that have any."""
    columns = {name: [entry.get(name) for entry in entries] for name in names}
    return {
        name: [None if value is None else float(f"{value:.4g}") for value in values]
        for name, values in columns.items()
        if any(value is not None for value in values)
    }


def _mean_length(run: Run, output: Path) -> float:
    """Mean number of tokens of the expert's right answers, the end token included; 0 if it has none."""
    lengths = [len(answer.split()) + 1 for row in _rows(run, output) for answer in _right(row)]
    return sum(lengths) / len(lengths) if lengths else 0.0


def _costs(phases: list, sft_length: float) -> list[dict]:
    """
    What each update cost. Tokens that models were run on, per rollout (or answer of the expert), prompts not counted: `policy` and `expert`
    for sampling, `trained` in the loss. And the `seconds` of the update, which TRL does not measure in supervised training.
    """
    supervised = {"policy": 0.0, "expert": 0.0, "trained": sft_length}
    return [
        supervised
        if isinstance(trainer, SFTTrainer)
        else cost_of_update(entry, trainer.num_guided_generations / trainer.num_generations)
        for trainer in phases
        for entry in _logged([trainer])
    ]


def cost_of_update(entry: dict, guided_share: float) -> dict[str, float]:
    """From what GRPO logged, where this share of the rollouts is guided, if any was."""
    guided_length = entry.get("guidance/completions/mean_length", 0.0)
    guided = guided_share * guided_length
    on_policy = (1 - guided_share if guided_length else 1.0) * entry["completions/mean_length"]
    return {
        "policy": on_policy + guided * entry.get("guidance/policy_forwards_per_token", 1.0),
        "expert": guided * entry.get("guidance/expert_forwards_per_token", 0.0),
        "trained": on_policy + guided,
        "seconds": entry["step_time"],
    }
