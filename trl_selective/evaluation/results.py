"""From the lines of an evaluation to numbers with intervals, and to a table."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trl_selective.evaluation.protocol import SamplingProtocol
from trl_selective.functional.diversity import pass_at_k
from trl_selective.intervals import Estimate, bootstrap


def summarize(path: str | os.PathLike, protocol: SamplingProtocol, ks: Sequence[int] | None = None) -> dict[str, Any]:
    """The numbers of a file of `evaluate_to_file`.

    Args:
        path: of the file.
        protocol: how its completions were drawn.
        ks: the k of pass@k, each at most the number of samples; 1, 2, 4, ... by default.

    Returns:
        num_problems, and the fields of the protocol.
        metrics: "pass@k", and with several samples "avg@n", the mean over all of them: means over problems in [0, 1] with their 95 % interval,
            a bootstrap over problems.
        mean_length: of a completion, in tokens.
        truncated: share of completions that were cut off.
        num_timed_out, timed_out: how many completions got no verdict, and which: pairs of problem and sample.
        num_without_reward: how many the reward function did not apply to, for instance since it could not read the solution: they count as wrong.
    """
    correct, lengths, truncated, timed_out, without = [], 0, 0, [], 0
    with Path(path).open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            correct.append(sum(line["is_correct"]))
            lengths += sum(line["lengths"])
            truncated += sum(line["is_truncated"])
            late = [[line["problem"], sample] for sample, late in enumerate(line["timed_out"]) if late]
            timed_out += late
            without += line["rewards"].count(None) - len(late)
    total = len(correct) * protocol.num_samples
    return {
        "num_problems": len(correct),
        **vars(protocol),
        "metrics": {name: asdict(estimate) for name, estimate in _metrics(correct, protocol, ks).items()},
        "mean_length": lengths / total,
        "truncated": truncated / total,
        "num_timed_out": len(timed_out),
        "timed_out": timed_out,
        "num_without_reward": without,
    }


def _metrics(num_correct: list[int], protocol: SamplingProtocol, ks: Sequence[int] | None) -> dict[str, Estimate]:
    counts = torch.tensor(num_correct)
    values = {f"pass@{k}": pass_at_k(protocol.num_samples, counts, k).double() for k in ks or protocol.default_ks}
    if protocol.num_samples > 1:
        values[f"avg@{protocol.num_samples}"] = counts.double() / protocol.num_samples
    return {name: bootstrap(value.numpy()[np.newaxis]) for name, value in values.items()}


def table(results: Mapping[str, Any]) -> str:
    """Results of several benchmarks as a page of Markdown, percentages with their intervals."""
    benchmarks = results["benchmarks"]
    metrics = sorted({name for each in benchmarks.values() for name in each["metrics"]}, key=_order)
    rows = [["", "problems", "samples", "T", *(f"{name}, %" for name in metrics), "tokens", "cut off, %", "timed out"]]
    for name, each in benchmarks.items():
        found = [
            Estimate(**each["metrics"][metric]).text(100) if metric in each["metrics"] else "" for metric in metrics
        ]
        counts = [each["num_problems"], each["num_samples"], each["temperature"]]
        costs = [f"{each['mean_length']:.0f}", f"{100 * each['truncated']:.1f}", each["num_timed_out"]]
        rows.append([name, *map(str, counts), *found, *map(str, costs)])
    return "\n".join([f"# {results['model']}", "", *_aligned(rows), "", *_notes(benchmarks)])


def _order(metric: str) -> tuple[str, int]:
    kind, _, k = metric.partition("@")
    return kind, int(k)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [f"| {line} |" for line in [lines[0], " | ".join("-" * width for width in widths), *lines[1:]]]


def _notes(benchmarks: Mapping[str, Any]) -> list[str]:
    notes = [
        "Means over problems with 95 % intervals, a bootstrap over problems. avg@n: mean over n samples. pass@k: unbiased, from all samples."
    ]
    for name, each in benchmarks.items():
        if each["num_timed_out"]:
            rows = ", ".join(f"{problem}/{sample}" for problem, sample in each["timed_out"])
            notes += ["", f"{name}: no verdict in time on (problem/sample) {rows}; they count as wrong."]
        if each["num_without_reward"]:
            notes += ["", f"{name}: no reward for {each['num_without_reward']} completions; they count as wrong."]
    return [*notes, ""]
