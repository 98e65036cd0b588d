"""The texts of completions, from whatever files they lie in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_selective.reporting.inputs import read_lines
from trl_selective.reporting.pass_at_k import RESULTS, benchmark_files, evaluation_folder

COLUMNS = ("completions", "completion", "expert_completions")
EXPECTED = (
    f"Expected .jsonl with a column out of {COLUMNS}, an output folder of recipes/evaluate.py, or the output folder of a run with "
    "log_completions=True"
)
TABLES = "completions_*.parquet"
HELPED = ("guided", "injected")  # columns that say which rollouts are not the policy's own

Completions = list[str] | dict[int, list[str]]  # of one model; or of one in training, by step


def read_completions(path: Path) -> Completions:
    """The texts; by step of training if they are rollouts, of TRL's tables, whose guided and injected rows are left out.

    Raises:
        ValueError: if there are none.
    """
    tables = [path] if path.suffix == ".parquet" else sorted([*path.glob(TABLES), *path.glob(f"completions/{TABLES}")])
    if tables:
        return _read_tables(tables)
    texts = [text for file in _text_files(path) for text in _read_texts(file)]
    if not texts:
        raise ValueError(f"{path} has no completions: all its lists are empty.")
    return texts


def _text_files(path: Path) -> list[Path]:
    if path.suffix == ".jsonl":
        return [path]
    if not any((folder / RESULTS).exists() for folder in (path, path / "evaluation")):
        raise ValueError(f"{path} has no completions. {EXPECTED}.")
    return list(benchmark_files(evaluation_folder(path)).values())


def as_text(completion: Any) -> str:
    """A text as it is; of a conversation, the contents of its messages."""
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") for message in completion]
    return "\n".join(content for content in contents if isinstance(content, str))


def _read_texts(path: Path) -> list[str]:
    texts = []
    for number, row in enumerate(read_lines(path), start=1):
        column = next((name for name in COLUMNS if row.get(name) is not None), None)
        if column is None:
            raise ValueError(f"{path}, line {number}: expected one of the columns {COLUMNS}, got {sorted(row)}.")
        texts += _texts(row[column], is_one=column == "completion")
    return texts


def _texts(value: Any, is_one: bool) -> list[str]:
    """The texts of one completion, or of several; an expert's single completion, a text or a conversation, may stand alone."""
    is_one = is_one or isinstance(value, str) or (len(value) > 0 and isinstance(value[0], Mapping))
    return [as_text(value)] if is_one else [as_text(each) for each in value]


def _read_tables(paths: Sequence[Path]) -> dict[int, list[str]]:
    import pandas as pd  # comes with TRL, which writes these files with it

    by_step: dict[int, list[str]] = {}
    for path in paths:
        table = pd.read_parquet(path)
        if not {"step", "completion"} <= set(table.columns):
            raise ValueError(
                f"{path} has the columns {list(table.columns)}, not step and completion: TRL's completions tables do."
            )
        helped = table[[name for name in HELPED if name in table.columns]].any(axis=1)
        for step, completion in table.loc[~helped, ["step", "completion"]].itertuples(index=False):
            by_step.setdefault(int(step), []).append(as_text(completion))
    if not by_step:
        raise ValueError(f"{paths[0].parent} has no rollouts of the policy itself: all are guided or injected.")
    return by_step
