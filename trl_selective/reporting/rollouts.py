"""The record of rollouts on disk: who drew which token, and what came of it. One file per logged step, one row per rollout.

`output_dir/rollouts/rollouts_<step>.parquet` holds the generation batch behind the metrics of that step, of all processes. Columns:

| column | meaning |
|---|---|
| `step` | as in the logs: optimizer steps done when the batch was logged |
| `group`, `row` | of the batch; of the group |
| `kind` | `on_policy`, `guided` or `injected` |
| `prompt`, `completion` | texts; a conversation as the policy is shown it |
| `reward`, `rewards/<function>`, `advantage` | the weighted sum, its parts, and what the loss made of it; null where nothing scored the row |
| `entropy_threshold`, `guidance_coef` | gamma_p in nats and alpha of the batch |
| `tokens`, `guidance_weights`, `entropies`, `expert_drawn`, `acceptance` | of guided rows: one entry per token, end token included |
| `source`, `selector`, `score` | of injected rows: who wrote the completion, which selector chose it, and what it gave |
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trl_selective.resuming import replacing
from trl_selective.rollout import GuidedRollout

FOLDER = "rollouts"
FILE_NAME = re.compile(r"rollouts_(\d{5,})\.parquet")
COLUMNS = {
    "step": pa.int64(),
    "group": pa.int64(),
    "row": pa.int64(),
    "kind": pa.string(),
    "prompt": pa.string(),
    "completion": pa.string(),
    "reward": pa.float64(),
    "advantage": pa.float64(),
    "entropy_threshold": pa.float64(),
    "guidance_coef": pa.float64(),
    "tokens": pa.list_(pa.string()),
    "guidance_weights": pa.list_(pa.float32()),
    "entropies": pa.list_(pa.float32()),
    "expert_drawn": pa.list_(pa.bool_()),
    "acceptance": pa.list_(pa.float32()),
    "source": pa.string(),
    "selector": pa.string(),
    "score": pa.float64(),
}


@dataclass
class LoggedBatch:
    """A generation batch as it is logged: columns of all processes, but for `rollout`.

    Attributes:
        prompts, completions: texts or conversations.
        rewards: total reward of each row, NaN where nothing scored it.
        rewards_per_func: the same of each reward function, by name.
        advantages: one per row.
        num_generations: rows of a group; groups lie one after another.
        entropy_threshold, guidance_coef: gamma_p in nats, None without one; alpha.
        extra: TRL's extra columns, of which those of guidance are read.
        rollout, guided_rows: the record of the guided rows of this process, and which of its `num_rows` they are.
        num_rows: of this process.
    """

    prompts: list
    completions: list
    rewards: list[float]
    rewards_per_func: dict[str, list[float]]
    advantages: list[float]
    num_generations: int
    entropy_threshold: float | None
    guidance_coef: float
    extra: dict[str, list]
    num_rows: int
    rollout: GuidedRollout | None = None
    guided_rows: list[int] = field(default_factory=list)

    def token_records(self, decode: Callable[[list[int]], str]) -> list[dict[str, list] | None]:
        """The per-token record of each row of this process, None for what is not guided."""
        records: list[dict[str, list] | None] = [None] * self.num_rows
        if self.rollout is not None:
            for row, record in zip(self.guided_rows, token_records(self.rollout, decode), strict=True):
                records[row] = record
        return records


def token_records(rollout: GuidedRollout, decode: Callable[[list[int]], str]) -> list[dict[str, list]]:
    """The per-token columns of each row. `acceptance` is the chance that the policy's drawing this token would have been accepted,
    min(1, pi_mix / pi_theta) (arXiv:2510.04140, Eq. 7)."""
    cached = lru_cache(maxsize=1 << 16)(lambda ids: decode(list(ids)))
    return [
        {
            "tokens": token_texts(rollout.completion_ids[row], cached),
            "guidance_weights": rollout.guidance_weights[row],
            "entropies": rollout.entropies[row],
            "expert_drawn": rollout.expert_drawn[row],
            "acceptance": log_ratio.neg().clamp(max=0).exp().tolist(),
        }
        for row, log_ratio in enumerate(rollout.log_ratios())
    ]


def token_texts(token_ids: Sequence[int], decode: Callable[[tuple[int, ...]], str]) -> list[str]:
    """The text that each token adds; joined, they are the decoded whole. A token that ends inside a character adds nothing: the character
    comes with the token that completes it."""
    ids, texts, start, end = tuple(token_ids), [], 0, 0
    for position in range(1, len(ids) + 1):
        before, text = decode(ids[start:end]), decode(ids[start:position])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and position < len(ids):
            texts.append("")
        else:
            texts.append(text[len(before) :])
            start, end = end, position
    return texts


def rollout_rows(
    batch: LoggedBatch, step: int, records: Sequence[dict[str, list] | None], render: Callable[[list], str]
) -> list[dict[str, Any]]:
    """The rows of a batch as they are written.

    Args:
        batch: of any process.
        step: of the logs.
        records: `token_records` of all processes.
        render: shows a conversation as the policy is shown it.
    """
    nothing = [None] * len(batch.prompts)
    guided, injected = (batch.extra.get(name, nothing) for name in ("guided", "injected"))
    chosen = {name: batch.extra.get(f"injection_{name}", nothing) for name in ("source", "selector", "score")}
    rows = []
    for number, prompt in enumerate(batch.prompts):
        kind = "injected" if injected[number] else "guided" if guided[number] else "on_policy"
        group, row = divmod(number, batch.num_generations)
        if row == 0:
            shown = prompt if isinstance(prompt, str) else render(prompt)
        record = records[number] if kind == "guided" else None
        rows.append(
            {
                "step": step,
                "group": group,
                "row": row,
                "kind": kind,
                "prompt": shown,
                "completion": _completion_text(batch.completions[number]),
                "reward": batch.rewards[number],
                "advantage": batch.advantages[number],
                "entropy_threshold": batch.entropy_threshold,
                "guidance_coef": batch.guidance_coef,
                **{f"rewards/{name}": values[number] for name, values in batch.rewards_per_func.items()},
                **(record or {}),
                **{name: values[number] for name, values in chosen.items()},
            }
        )
    return rows


def _completion_text(completion: Any) -> str:
    """What the assistant says, with its reasoning where TRL keeps that apart."""
    if isinstance(completion, str):
        return completion
    entries = [
        entry for message in completion for entry in sorted(message.items(), key=lambda entry: entry[0] == "content")
    ]
    return "\n".join(str(value) for name, value in entries if name != "role" and value)


def write_rollouts(rows: Sequence[dict[str, Any]], folder: str | Path) -> Path:
    """Write the rows of one step into an output folder, whole or not at all, in place of what it holds of that step.

    Args:
        rows: as `rollout_rows` makes them, all of one step.
        folder: the run's `output_dir`.

    Raises:
        ValueError: if there are no rows, or rows of several steps.
    """
    steps = {row["step"] for row in rows}
    if len(steps) != 1:
        raise ValueError(
            f"A file holds the rollouts of one step, got those of steps {sorted(steps)}: write one at a time."
        )
    path = Path(folder, FOLDER, f"rollouts_{steps.pop():05d}.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    functions = {name: pa.float64() for row in rows for name in row if name.startswith("rewards/")}
    schema = pa.schema([*COLUMNS.items(), *functions.items()])
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist([_storable(row) for row in rows], schema), partial, compression="zstd")
    return path


def _storable(value: Any) -> Any:
    """Without lone surrogates, which no file can hold, and with null for NaN, which is what it means here."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {key: _storable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_storable(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def recorded_steps(folder: str | Path) -> list[int]:
    """The steps whose rollouts an output folder holds, in order."""
    return sorted(_files(folder))


def num_recorded(folder: str | Path, step: int) -> int:
    """How many rollouts a step has; reads none of them."""
    return pq.read_metadata(_files(folder)[step]).num_rows


def read_rollouts(folder: str | Path, steps: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """The rollouts of these steps of an output folder, or of all that it holds, in their order.

    Raises:
        ValueError: if it does not hold them, or a file is not what `write_rollouts` writes.
    """
    files = _files(folder)
    if not files:
        raise ValueError(
            f"{folder} has no {FOLDER}/rollouts_<step>.parquet. Give the output_dir of a run with guidance or injection and with "
            "log_completions=True."
        )
    missing = [step for step in steps or () if step not in files]
    if missing:
        raise ValueError(f"{folder} has no rollouts of steps {missing}, only of {sorted(files)}.")
    return [row for step in sorted(files) if steps is None or step in steps for row in _read(files[step])]


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, or train that step again.") from error
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} has no columns {missing}: it was not written by this trainer. Move it elsewhere.")
    return table.to_pylist()


def _files(folder: str | Path) -> dict[int, Path]:
    found = {path: FILE_NAME.fullmatch(path.name) for path in Path(folder, FOLDER).glob("*.parquet")}
    return {int(match[1]): path for path, match in found.items() if match}
