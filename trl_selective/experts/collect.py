"""Makes the columns that `CompletionReader` reads: every row of a dataset with whole completions of an expert, and the verifier's verdict.

One JSON line for each row goes to disk as soon as the row is done, so that memory stays flat and a run that was killed can go on. Beside
`FILE`, the hidden `.FILE.settings` holds what the rows depend on, so that one file never mixes two experts or temperatures.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from trl_selective.experts.sources import Completion, Source
from trl_selective.grading import Verifier, as_completion
from trl_selective.resuming import check_settings, count_rows, to_json

COLUMNS = ("expert_completions", "expert_logprobs", "expert_sources", "expert_rewards")
RIGHT_ABOVE = 0.5  # a reward, as in `evaluate`


@dataclass
class Tally:
    """What became of the completions of one run.

    Attributes:
        num_resumed: rows that an earlier run had written; they count here alone.
        num_rows: rows written now.
        num_drawn: completions drawn for them.
        num_unfinished: of these, cut off at the length limit, or empty: dropped.
        num_scored: of the others, how many the verifier could score.
        num_right: of these, how many have a reward above 0.5.
        num_kept: completions written: those that are whole, and whose reward is above `only_above`.
        num_without_logprobs: of these.
    """

    num_resumed: int = 0
    num_rows: int = 0
    num_drawn: int = 0
    num_unfinished: int = 0
    num_scored: int = 0
    num_right: int = 0
    num_kept: int = 0
    num_without_logprobs: int = 0

    def add(
        self,
        completions: Sequence[Completion],
        rewards: Sequence[float | None],
        kept: Sequence[tuple[Completion, float | None]],
    ) -> None:
        """Count a row: all that was drawn, the rewards of what is whole, and what is kept."""
        scored = [reward for reward in rewards if reward is not None]
        self.num_rows += 1
        self.num_drawn += len(completions)
        self.num_unfinished += len(completions) - len(rewards)
        self.num_scored += len(scored)
        self.num_right += sum(reward > RIGHT_ABOVE for reward in scored)
        self.num_kept += len(kept)
        self.num_without_logprobs += sum(completion.logps is None for completion, _ in kept)


def collect(
    rows: Dataset,
    source: Source,
    verifier: Verifier,
    path: str | os.PathLike,
    *,
    only_above: float | None = None,
) -> Tally:
    """Append each row with its expert completions to a JSON Lines file, from the first row on that is not in it.

    A row keeps its columns and gets `expert_completions` (in the form of the prompt), `expert_logprobs`, `expert_sources` and
    `expert_rewards`: lists with one entry for each completion, null where it is not known.

    Args:
        rows: with the column `prompt` (texts or conversations), and whatever the reward functions ask for.
        source: who answers.
        verifier: what the answers are worth.
        path: of the file.
        only_above: keep only completions with a reward above this.

    Raises:
        ValueError: if the file is of other rows or settings, or if the rows lack a prompt or have one of the new columns.
    """
    if "prompt" not in rows.column_names or set(COLUMNS) & set(rows.column_names):
        raise ValueError(
            f"Expected rows with a column 'prompt', and without {list(COLUMNS)}, which are written here, got {rows.column_names}. Rename what "
            "is in the way."
        )
    if only_above is not None and not verifier.reward_funcs:
        raise ValueError(f"only_above={only_above} needs a reward to compare, got no reward functions. Give some.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_settings(path, {**source.settings, "verifier": verifier.settings, "only_above": only_above})
    tally = Tally(num_resumed=count_rows(path, rows))
    answers = source.complete(rows["prompt"], tally.num_resumed)
    with path.open("a", encoding="utf-8") as file:
        remaining = tqdm(
            range(tally.num_resumed, len(rows)), initial=tally.num_resumed, total=len(rows), desc="collect", unit="row"
        )
        for index, completions in zip(remaining, answers, strict=True):
            row = rows[index]
            whole = [completion for completion in completions if completion.is_whole]
            rewards = verifier(row, [each.text for each in whole], [each.token_ids for each in whole])
            kept = [
                (completion, reward)
                for completion, reward in zip(whole, rewards, strict=True)
                if only_above is None or (reward is not None and reward > only_above)
            ]
            file.write(to_json({**row, **_columns(row, kept, source.name)}, index) + "\n")
            file.flush()
            tally.add(completions, rewards, kept)
    return tally


def _columns(row: Mapping[str, Any], kept: Sequence[tuple[Completion, float | None]], name: str) -> dict[str, list]:
    """What a row gets: `COLUMNS`."""
    values = (
        [as_completion(row["prompt"], completion.text) for completion, _ in kept],
        [completion.logps for completion, _ in kept],
        [name] * len(kept),
        [reward for _, reward in kept],
    )
    return dict(zip(COLUMNS, values, strict=True))
