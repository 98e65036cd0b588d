"""Evaluates a model into a JSON Lines file, one problem at a time, so that a run that was killed goes on where it stopped.

A completion depends on the seed, its problem and its number alone, and problems are drawn in the same batches again: the file of a run that was
killed and started again is that of an unbroken one, byte for byte.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from trl_selective.evaluation.backends import Backend
from trl_selective.evaluation.protocol import SamplingProtocol, check_problems
from trl_selective.grading import grade, reward_arguments
from trl_selective.grading_pool import GradingPool, Verdict
from trl_selective.resuming import check_settings, count_rows, to_json
from trl_selective.sampling.unguided import encode_prompt


def evaluate_to_file(
    dataset: Dataset,
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    reward_func: Callable,
    protocol: SamplingProtocol,
    path: str | os.PathLike,
    *,
    settings: Mapping[str, Any],
    batch_size: int = 64,
    correct_above: float = 0.5,
    grading_timeout: float = 10.0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    description: str = "evaluate",
) -> None:
    """Append a line for each problem, from the first one on that is not in the file.

    A line has `problem` (its number), `prompt`, `solution` where there is one, and a list with one entry for each completion of `completions`,
    `rewards` (null where there is none), `is_correct`, `lengths` (tokens, the end token included), `is_truncated`, and `timed_out` (no verdict
    within the time limit, or the process that graded it ended: counts as wrong).

    Args:
        dataset: a column `prompt` (texts or conversations), and whatever `reward_func` asks for.
        backend: who draws completions.
        tokenizer: the model's; with a chat template if prompts are conversations.
        reward_func: as TRL calls it. With a time limit, other processes must be able to import it.
        protocol: how completions are drawn.
        path: of the file.
        settings: what else the lines depend on, such as the model. What is given here is added to it.
        batch_size: completions drawn and graded before their lines are written; at least one problem.
        correct_above: a completion is right when its reward exceeds this.
        grading_timeout: seconds for one completion; 0 calls the function in this process, for whole batches, without a limit.
        chat_template_kwargs: further arguments of `apply_chat_template`, for conversations.
        description: of the progress bar.

    Raises:
        ValueError: if the file is of other problems or settings, or if the rows have no prompt.
    """
    check_problems(dataset)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    limits = {"correct_above": correct_above, "grading_timeout": grading_timeout}
    function = f"{reward_func.__module__}.{reward_func.__name__}"
    template = {"chat_template_kwargs": dict(chat_template_kwargs or {})}
    check_settings(path, {**settings, **vars(protocol), **limits, **template, "reward_func": function})
    names = [name for name in ("prompt", "solution") if name in dataset.column_names]
    known = [{"problem": number, **row} for number, row in enumerate(dataset.select_columns(names))]
    done = count_rows(path, known)

    step = max(1, batch_size // protocol.num_samples)
    pool = GradingPool(reward_func, grading_timeout) if grading_timeout else None
    with (
        path.open("a", encoding="utf-8") as file,
        pool or nullcontext(),
        tqdm(total=len(dataset), desc=description, unit="problem") as bar,
    ):
        bar.update(done)
        for start in range(done // step * step, len(dataset), step):
            numbers = range(start, min(start + step, len(dataset)))
            columns = _sample(dataset, numbers, backend, tokenizer, protocol, chat_template_kwargs)
            batch = dataset[[number for number in numbers for _ in range(protocol.num_samples)]]
            verdicts = _grade(reward_func, pool, batch, columns["completions"], columns.pop("token_ids"))
            columns["rewards"] = [verdict.reward for verdict in verdicts]
            columns["is_correct"] = [each is not None and each > correct_above for each in columns["rewards"]]
            columns["timed_out"] = [verdict.timed_out for verdict in verdicts]
            for place, number in enumerate(numbers):
                if number >= done:
                    part = slice(place * protocol.num_samples, (place + 1) * protocol.num_samples)
                    samples = {name: values[part] for name, values in columns.items()}
                    file.write(to_json({**known[number], **samples}, number) + "\n")
                    file.flush()
                    bar.update()


def _sample(
    dataset: Dataset,
    numbers: range,
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    protocol: SamplingProtocol,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> dict[str, list]:
    """The completions of some problems, those of one problem beside one another, and what is known of them."""
    prompts = [encode_prompt(tokenizer, dataset[number]["prompt"], chat_template_kwargs) for number in numbers]
    samples = range(protocol.num_samples)
    token_ids = backend.complete(
        [ids for ids in prompts for _ in samples],
        [protocol.seed_of(number, sample) for number in numbers for sample in samples],
        protocol,
    )
    return {
        "completions": tokenizer.batch_decode(token_ids, skip_special_tokens=True),
        "lengths": [len(ids) for ids in token_ids],
        "is_truncated": [not ids or ids[-1] not in backend.eos_token_ids for ids in token_ids],
        "token_ids": token_ids,
    }


def _grade(
    reward_func: Callable,
    pool: GradingPool | None,
    batch: Mapping[str, Sequence[Any]],
    texts: Sequence[str],
    token_ids: Sequence[Sequence[int]],
) -> list[Verdict]:
    if pool is None:
        return [Verdict(reward, False) for reward in grade(reward_func, batch, texts, token_ids)]
    arguments = reward_arguments(batch, texts, token_ids)
    return pool.grade([{name: [values[row]] for name, values in arguments.items()} for row in range(len(texts))])
