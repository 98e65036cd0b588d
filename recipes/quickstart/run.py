"""The quickstart: train a tiny policy with plain GRPO and with guidance, from the same start, with the same rollouts and updates, and compare.

    python recipes/quickstart/run.py
    python recipes/quickstart/run.py --runs grpo guided selected

`guided` is token-level guidance by the expert model, `selected` gives whole completions of the expert to groups that failed.

Nothing is downloaded: task, policy and expert are beside this file (`--rebuild` makes the models anew, from nothing). Training is started as
with any model: `accelerate launch recipes/selective_grpo.py --config ...`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are slower with more
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import transformers
from task import FILLER, MAX_COMPLETION_TOKENS, Problem, path_reward, train_and_heldout
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_selective.evaluation import Evaluation, evaluate
from trl_selective.reporting.plots import plot_pass_at_k, plot_training_dynamics

HERE = Path(__file__).parent
SCRIPT, COLLECT = HERE.parent / "selective_grpo.py", HERE.parent / "collect_expert_completions.py"
KS = (1, 2, 4, 8, 16)
RUNS = ("grpo", "guided", "selected")


def write_problems(problems: list[Problem], path: Path) -> datasets.Dataset:
    rows = [{"prompt": p.prompt, "walls": p.walls, "start": p.start, "goal": p.goal} for p in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return datasets.Dataset.from_list(rows)


def cells(answer: str) -> tuple[str, ...]:
    """What makes two right answers the same solution: the cells they visit."""
    return tuple(word for word in answer.split() if word != FILLER)[1::2]


def evaluate_folder(folder: Path, heldout: datasets.Dataset, num_samples: int, name: str) -> Evaluation:
    return evaluate(
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        heldout,
        path_reward,
        num_samples=num_samples,
        ks=[k for k in KS if k <= num_samples],
        max_completion_length=MAX_COMPLETION_TOKENS,
        seed=2026,
        answer_key=cells,
        description=f"evaluate {name}",
    )


def run(name: str, command: list, output: Path) -> float:
    """Run a command as a user would, with its output in `NAME.log`. Returns the seconds it took."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])  # where task.path_reward is found
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore::FutureWarning"}
    command = [str(part) for part in command]
    print(f"\n{name}: " + " ".join(command), flush=True)
    started = time.perf_counter()
    log = output / f"{name}.log"
    with log.open("w") as file:  # what is printed at every step; the progress bar stays on the screen
        failed = subprocess.run([sys.executable, *command], env=environment, stdout=file, check=False).returncode
    if failed:
        sys.exit(f"{name} failed; what it printed is above and in {log}.")
    return time.perf_counter() - started


def options(settings: dict) -> list:
    return [part for key, value in settings.items() for part in (f"--{key}", value)]


def collect(output: Path) -> Path:
    """Four completions of the expert for each training problem, with the verifier's verdict. Returns the file."""
    settings = {
        "dataset_name": output / "train.jsonl",
        "expert_model_name_or_path": HERE / "expert",
        "reward_funcs": "task.path_reward",
        "num_completions": 4,
        "max_completion_length": MAX_COMPLETION_TOKENS,
        "batch_size": 256,
        "output_file": output / "train_with_expert.jsonl",
    }
    run("collect", [COLLECT, *options(settings)], output)
    return settings["output_file"]


def train(name: str, output: Path, arguments: argparse.Namespace) -> float:
    """Start the training script. Returns the seconds it took."""
    settings = {
        "model_name_or_path": HERE / "policy",
        "dataset_name": collect(output) if name == "selected" else output / "train.jsonl",
        "output_dir": output / name,
        "seed": arguments.seed,
    }
    if name == "guided":
        settings["expert_model_name_or_path"] = HERE / "expert"
    if arguments.max_steps:
        settings["max_steps"] = arguments.max_steps
    launch = ["--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launch.append("--num_cpu_threads_per_process=1")
    command = ["-m", "accelerate.commands.launch", *launch, SCRIPT, "--config", HERE / f"{name}.yaml"]
    return run(name, [*command, *options(settings)], output)


def table(evaluations: dict[str, Evaluation]) -> str:
    """The comparison, one column per model."""

    def numbers(evaluation: Evaluation) -> list[str]:
        passed = [
            f"{evaluation.pass_at_k[k]:6.1%} ± {evaluation.standard_error[k]:.1%}"
            for k in (1, max(evaluation.pass_at_k))
        ]
        return [*passed, f"{evaluation.distinct_correct:.2f}"]

    example = next(iter(evaluations.values()))
    rows = ["pass@1", f"pass@{max(example.pass_at_k)}", f"distinct correct of {example.num_samples}"]
    lines = ["".join([f"{'':24}", *(f"{name:>18}" for name in evaluations)])]
    columns = [numbers(evaluation) for evaluation in evaluations.values()]
    lines += ["".join([f"{row:24}", *(f"{column[i]:>18}" for column in columns)]) for i, row in enumerate(rows)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS[:2], help="what to train")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--max_steps", type=int, help="updates, if not those of the YAML files")
    parser.add_argument("--num_samples", type=int, default=32, help="answers to each held-out problem")
    parser.add_argument("--rebuild", action="store_true", help="make policy and expert anew first, about ten minutes")
    arguments = parser.parse_args()
    if arguments.rebuild:
        subprocess.run([sys.executable, HERE / "make_models.py"], check=True)
    transformers.utils.logging.disable_progress_bar()
    output = arguments.output_dir.resolve()
    output.mkdir(parents=True, exist_ok=True)

    training, heldout = train_and_heldout()
    write_problems(training, output / "train.jsonl")
    problems = write_problems(heldout, output / "heldout.jsonl")
    seconds = {name: train(name, output, arguments) for name in arguments.runs}

    folders = {"start": HERE / "policy", **{name: output / name for name in arguments.runs}, "expert": HERE / "expert"}
    evaluations = {name: evaluate_folder(f, problems, arguments.num_samples, name) for name, f in folders.items()}
    states = {name: json.loads((output / name / "trainer_state.json").read_text()) for name in arguments.runs}
    plot_training_dynamics(
        {name: state["log_history"] for name, state in states.items()}, output / "training_dynamics.png"
    )
    plot_pass_at_k(evaluations, output / "pass_at_k.png")
    with (output / "heldout_completions.jsonl").open("w") as file:
        for name, evaluation in evaluations.items():
            samples = zip(heldout, evaluation.completions, evaluation.is_correct, strict=True)
            for problem, completions, is_correct in samples:
                row = {"model": name, "prompt": problem.prompt, "completions": completions, "is_correct": is_correct}
                file.write(json.dumps(row) + "\n")
    updates = {name: state["global_step"] for name, state in states.items()}
    results = {name: evaluation.to_dict() for name, evaluation in evaluations.items()}
    summary = {"evaluations": results, "updates": updates, "seconds": seconds, "seed": arguments.seed}
    (output / "results.json").write_text(json.dumps(summary, indent=2))

    print(f"\n{len(heldout)} held-out problems, {arguments.num_samples} answers to each\n\n{table(evaluations)}\n")
    for name in arguments.runs:
        print(f"{name}: {updates[name]} updates of 128 rollouts each, {seconds[name]:.0f} s")
    if "grpo" in arguments.runs:
        for name in (name for name in arguments.runs if name != "grpo"):
            gained = 100 * (evaluations[name].pass_at_k[1] - evaluations["grpo"].pass_at_k[1])
            print(f"With the same rollouts and updates, {name} is {gained:+.0f} points of pass@1 from plain GRPO.")
    print(f"Models with their cards, completions, logs, results.json and pictures are in {output}")


if __name__ == "__main__":
    main()
