"""Evaluation results in a model card: a table for readers, a model index for the Hub. Reads `results.json` of recipes/evaluate.py."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from trl_selective.intervals import Estimate
from trl_selective.reporting.markdown import table
from trl_selective.reporting.names import hub_id

NEEDED = ("dataset", "split", "num_problems", "num_samples", "metrics")

Benchmarks = Mapping[str, Mapping[str, Any]]


def read_results(path: Path) -> Benchmarks:
    """The benchmarks of a `results.json`, checked.

    Raises:
        ValueError: if it is no such file.
    """
    try:
        benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
        for name, benchmark in benchmarks.items():
            if missing := [key for key in NEEDED if key not in benchmark]:
                raise ValueError(f"benchmark {name!r} has no {', '.join(missing)}")
            for metric, value in benchmark["metrics"].items():
                check_metric(f"{metric} of {name!r}", value)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path.parent.name}/{path.name} is no result of recipes/evaluate.py ({error!r}). Evaluate again, or remove it."
        ) from error
    return benchmarks


def check_metric(name: str, value: Mapping[str, float]) -> None:
    for key in ("mean", "low", "high"):
        if not (isinstance(value[key], int | float) and 0 <= value[key] <= 1):
            raise ValueError(f"{key} of {name} must lie in [0, 1], got {value[key]!r}")


def eval_results(benchmarks: Benchmarks) -> list[EvalResult]:
    """What the Hub shows beside the model: one entry per benchmark and metric, as fractions."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=hub_id(benchmark["dataset"]) or name,
            dataset_name=name,
            dataset_split=benchmark["split"],
            metric_type=metric,
            metric_name=metric,
            metric_value=round(value["mean"], 4),
        )
        for name, benchmark in benchmarks.items()
        for metric, value in benchmark["metrics"].items()
    ]


def evaluation_section(benchmarks: Benchmarks) -> str:
    """The results as a table, one line per benchmark, one column per metric."""
    metrics = list(dict.fromkeys(metric for benchmark in benchmarks.values() for metric in benchmark["metrics"]))
    rows = []
    for name, benchmark in benchmarks.items():
        dataset = hub_id(benchmark["dataset"])
        label = f"[{name}](https://huggingface.co/datasets/{dataset})" if dataset else name
        sizes = (f"{benchmark['num_problems']}", f"{benchmark['num_samples']}")
        found = [
            Estimate(**values).text(100) if (values := benchmark["metrics"].get(metric)) else "" for metric in metrics
        ]
        rows.append((label, *sizes, *found))
    lines = ["## Evaluation", table(["benchmark", "problems", "samples each", *metrics], rows)]
    lines.append("In percent, with 95 % bootstrap intervals over problems." + settings_of(benchmarks))
    return "\n\n".join(lines)


def settings_of(benchmarks: Benchmarks) -> str:
    """Temperatures, and how many answers took the verifier too long, where they are known."""
    temperatures = {name: b["temperature"] for name, b in benchmarks.items() if "temperature" in b}
    timed_out = sum(benchmark.get("num_timed_out", 0) for benchmark in benchmarks.values())
    words = ""
    if len(set(temperatures.values())) == 1:
        words += f" Sampled at temperature {next(iter(temperatures.values())):g}."
    elif temperatures:
        words += " Sampled at temperature " + ", ".join(f"{t:g} ({name})" for name, t in temperatures.items()) + "."
    return words + (f" {timed_out} answers whose check timed out count as wrong." if timed_out else "")
