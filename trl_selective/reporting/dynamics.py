"""The command `dynamics`: how training runs went, from their output folders."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from trl_selective.reporting.inputs import NAMED, add_output, named_paths, read_json
from trl_selective.reporting.plots import plot_training_dynamics

FILE, STATE = "training_dynamics.png", "trainer_state.json"


def save_training_dynamics(log_history: Sequence[Mapping], output_dir: str | Path) -> str | None:
    """Save the picture of a run in its output folder. Returns why there is none, where there is none."""
    path = Path(output_dir, FILE)
    try:
        plot_training_dynamics({path.resolve().parent.name: log_history}, path)
    except Exception as error:  # noqa: BLE001  no matplotlib, nothing logged, a full disk: no reason to lose a run
        return str(error)
    return None


def read_log_history(run: Path) -> list[dict]:
    """What a run logged: from its output folder, or from the last checkpoint there where that is ahead.

    Raises:
        ValueError: if neither has a `trainer_state.json`, or it is not one.
    """
    checkpoints = [path for path in run.glob(f"checkpoint-*/{STATE}") if path.parent.name.split("-")[-1].isdigit()]
    last = sorted(checkpoints, key=lambda path: int(path.parent.name.split("-")[-1]))[-1:]
    paths = [path for path in (run / STATE, *last) if path.exists()]
    if not paths:
        raise ValueError(
            f"{run} has no {STATE}, and no checkpoint in it has. Expected the `output_dir` of a run: `trainer.save_state()` writes the file, and so "
            "does every checkpoint."
        )
    states = [read_json(path) for path in paths]
    if not all(isinstance(state, dict) and {"global_step", "log_history"} <= set(state) for state in states):
        raise ValueError(
            f"{' or '.join(map(str, paths))} is not what `trainer.save_state()` writes: it has no log_history."
        )
    return max(states, key=lambda state: state["global_step"])["log_history"]


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "dynamics",
        help="training curves of one or several runs",
        description="Draw how runs went, from the logs in their output folders, or in the last checkpoint of runs that have not ended: one panel "
        "per quantity, one colour per run.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"output folder of a run: {NAMED}")
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=(),
        metavar="METRIC",
        help="what to draw instead: names, or patterns such as 'rewards/*', a panel for each",
    )
    parser.add_argument(
        "--smooth",
        type=int,
        metavar="N",
        help="show means of N logged values (default: a fiftieth of them where there are more than 200; 1: none)",
    )
    add_output(parser, FILE)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    histories = {name: read_log_history(path) for name, path in named_paths(arguments.runs).items()}
    plot_training_dynamics(histories, arguments.output, metrics=arguments.metrics, smooth=arguments.smooth)
    print(f"Wrote {arguments.output}")
