"""The command `pass_at_k`: what models can do with k tries, from the output folders of `recipes/evaluate.py`."""

import argparse
from pathlib import Path

from trl_selective.reporting.inputs import NAMED, add_output, named_paths, read_json, read_lines
from trl_selective.reporting.markdown import padded_table
from trl_selective.reporting.pass_at_k_plots import Curve, draw_pass_at_k, pass_at_k_curve

RESULTS = "results.json"


def evaluation_folder(path: Path) -> Path:
    """The folder itself, or `evaluation` in the output folder of a training run.

    Raises:
        ValueError: if neither has results.
    """
    for folder in (path, path / "evaluation"):
        if (folder / RESULTS).exists():
            return folder
    raise ValueError(
        f"{path} has no {RESULTS}, nor has its folder evaluation. Expected the output folder of recipes/evaluate.py."
    )


def benchmark_files(folder: Path) -> dict[str, Path]:
    """Benchmark -> the file with its samples, in the order of the results.

    Raises:
        ValueError: if the results name none, or a file is not there.
    """
    results = read_json(folder / RESULTS)
    names = list(results.get("benchmarks") or ()) if isinstance(results, dict) else []
    files = {name: folder / f"{name}.jsonl" for name in names}
    missing = [path.name for path in files.values() if not path.exists()]
    if missing or not files:
        raise ValueError(
            f"{folder}: expected one file of samples per benchmark in {RESULTS}, which has {names}; {missing or 'all'} missing."
        )
    return files


def read_is_correct(path: Path) -> list[list[bool]]:
    """Whether the samples of each problem are right.

    Raises:
        ValueError: if a problem has no samples.
    """
    found = []
    for number, row in enumerate(read_lines(path), start=1):
        is_correct = row.get("is_correct")
        if not isinstance(is_correct, list) or not is_correct:
            raise ValueError(
                f"{path}, line {number}: expected a list is_correct, got {is_correct!r}: is it a file of recipes/evaluate.py?"
            )
        found.append([bool(each) for each in is_correct])
    return found


def read_curves(evaluations: dict[str, Path]) -> dict[str, dict[str, Curve]]:
    """Benchmark -> model -> its curve, from model -> folder."""
    curves: dict[str, dict[str, Curve]] = {}
    for model, folder in evaluations.items():
        for benchmark, path in benchmark_files(folder).items():
            curves.setdefault(benchmark, {})[model] = pass_at_k_curve(read_is_correct(path))
    return curves


def table(curves: dict[str, dict[str, Curve]]) -> str:
    """pass@k in percent with its interval, for k = 1, 2, 4, ..., one line per benchmark and model."""
    longest = max(len(each.mean) for panel in curves.values() for each in panel.values())
    ks = [2**power for power in range(longest.bit_length())]
    rows = [
        [f"{benchmark}, {model}", *(_cell(each, k) for k in ks)]
        for benchmark, panel in curves.items()
        for model, each in panel.items()
    ]
    return padded_table(["%", *(f"pass@{k}" for k in ks)], rows)


def _cell(each: Curve, k: int) -> str:
    if k > len(each.mean):
        return ""
    mean, low, high = (f"{100 * values[k - 1]:.1f}" for values in each)
    return mean if low == "nan" else f"{mean} [{low}, {high}]"


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "pass_at_k",
        help="pass@k curves of evaluated models",
        description="Draw pass@k for every k, with 95 % intervals over problems, from the samples that recipes/evaluate.py saved: one panel per "
        "benchmark, one colour per model. Prints the curves at k = 1, 2, 4, ... as a table.",
    )
    parser.add_argument(
        "evaluations",
        nargs="+",
        metavar="EVALUATION",
        help=f"output folder of recipes/evaluate.py, or of a run that has it in evaluation/: {NAMED}",
    )
    add_output(parser, "pass_at_k.png")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    folders = {name: evaluation_folder(path) for name, path in named_paths(arguments.evaluations).items()}
    curves = read_curves(folders)
    print(table(curves), end="\n\n")
    panels = {name: panel for name, panel in curves.items() if any(len(each.mean) > 1 for each in panel.values())}
    if not panels:
        raise ValueError(
            "One sample per problem makes no curve, hence no picture. Draw more samples with recipes/evaluate.py."
        )
    draw_pass_at_k(panels, arguments.output)
    print(f"Wrote {arguments.output}")
