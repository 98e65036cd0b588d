"""Whole expert completions from columns of the dataset: what they look like, and how they become tokens of the policy.

A row has zero, one or several completions for its prompt: texts, or conversations of one assistant message. They are tokenised with the
policy's own tokenizer and chat template, behind exactly the prompt that the policy answers, so that a text of any model will do.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_selective.reward_calls import PREVIEW, preview

OVERLONG = ("drop", "truncate")


class EmptyCompletionError(ValueError):
    """A completion in which the policy reads nothing that it could learn from."""


@dataclass(frozen=True)
class ExpertCompletion:
    """One completion that may be injected.

    Attributes:
        token_ids: of the policy's tokenizer; the end token is the last one, unless the completion was truncated.
        logps: log pi_b of each token under the expert that wrote it, if known.
        source: name of that expert, if known.
    """

    token_ids: tuple[int, ...]
    logps: tuple[float, ...] | None = None
    source: str | None = None

    @property
    def key(self) -> str:
        """A short name for the text, the same in every process and run."""
        return hashlib.sha256(repr(self.token_ids).encode()).hexdigest()[:16]


@dataclass
class CompletionReader:
    """Reads the expert completions of a dataset row.

    Args:
        tokenizer: the policy's.
        eos_token_ids: ids that end a completion of the policy; the first one is appended where a text does not end with any.
        max_completion_length: tokens, the end token included.
        completions_column, logprobs_column, sources_column: names of the columns; the last two may be None.
        overlong: what becomes of longer completions: "drop", or "truncate" (they then have no end token, as a rollout that was cut off).
        needs_logps: whether every completion must have its log-probabilities.
        render: turns a conversation into text as the policy sees it: `render(messages, add_generation_prompt)`.

    Attributes:
        num_read: completions read so far, those of dropped ones included.
        num_overlong: of these, how many were longer than `max_completion_length`.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: Sequence[int]
    max_completion_length: int
    completions_column: str
    logprobs_column: str | None
    sources_column: str | None
    overlong: str
    needs_logps: bool
    render: Callable[[Sequence[Mapping], bool], str]
    num_read: int = field(default=0, init=False)
    num_overlong: int = field(default=0, init=False)

    @property
    def columns(self) -> list[str]:
        """The columns that are set."""
        names = (self.completions_column, self.logprobs_column, self.sources_column)
        return [name for name in names if name is not None]

    def check(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Look at all rows of a dataset before training starts. Texts are only tokenised where log-probabilities have to fit them.

        Raises:
            ValueError: naming the row and what is wrong with it.
        """
        is_any = False
        for index, row in enumerate(rows):
            name = f"Row {index}"
            if self.logprobs_column is not None:
                self.read(row, name)
            texts = self._texts(row, name)
            self._sources(row, len(texts), name)
            if texts and not is_any:
                is_any = True
                self._warn_of_two_ends(texts[0])
        if not is_any:
            raise ValueError(
                f"No row has a completion in the column {self.completions_column!r}: nothing could ever be injected. Fill it, or set "
                "num_injected_completions=0."
            )
        self.num_read = self.num_overlong = 0

    def read(self, row: Mapping[str, Any], where: str | None = None) -> list[ExpertCompletion]:
        """The completions of one row: see `read_all`."""
        return self.read_all([row], None if where is None else [where])[0]

    def read_all(
        self, rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None
    ) -> list[list[ExpertCompletion]]:
        """The completions that fit of each row, in their order, tokenised in one go.

        Args:
            rows: rows of the dataset, with the column `prompt`.
            names: how to name each in a message.

        Raises:
            ValueError: if a row is malformed.
        """
        names = names or [f"The row with the prompt {preview(row['prompt'])}" for row in rows]
        texts = [self._texts(row, name) for row, name in zip(rows, names, strict=True)]
        token_ids = iter(self._tokenize([text for found in texts for text in found]))
        return [
            self._fitting(row, [next(token_ids) for _ in found], name)
            for row, name, found in zip(rows, names, texts, strict=True)
        ]

    def _fitting(self, row: Mapping[str, Any], all_token_ids: list[list[int]], name: str) -> list[ExpertCompletion]:
        """The completions of a row with these tokens, without those that are too long."""
        logprobs = self._aligned(row, self.logprobs_column, len(all_token_ids), name)
        sources = self._sources(row, len(all_token_ids), name)
        found = []
        for number, (token_ids, logps, source) in enumerate(zip(all_token_ids, logprobs, sources, strict=True)):
            if token_ids[0] in self.eos_token_ids:
                raise EmptyCompletionError(
                    f"{name}, completion {number} in {self.completions_column!r} has no text before its first end token: there is nothing to "
                    "learn from it. Leave it out."
                )
            self._check_logps(logps, token_ids, f"{name}, completion {number}")
            self.num_read += 1
            self.num_overlong += len(token_ids) > self.max_completion_length
            if len(token_ids) <= self.max_completion_length or self.overlong == "truncate":
                ids = tuple(token_ids[: self.max_completion_length])
                found.append(ExpertCompletion(ids, None if logps is None else tuple(logps[: len(ids)]), source))
        return found

    def _texts(self, row: Mapping[str, Any], name: str) -> list[str]:
        """What follows the prompt with each completion of a row."""
        return [
            self._text(row["prompt"], completion, f"{name}, completion {number}")
            for number, completion in enumerate(self._completions(row, name))
        ]

    def _sources(self, row: Mapping[str, Any], num_completions: int, name: str) -> list[str | None]:
        """Who wrote each completion of a row."""
        sources = self._aligned(row, self.sources_column, num_completions, name)
        for number, source in enumerate(sources):
            if source is not None and not isinstance(source, str):
                raise ValueError(
                    f"{name}, completion {number} has the source {source!r} in {self.sources_column!r}, expected a name or None."
                )
        return sources

    def _completions(self, row: Mapping[str, Any], where: str) -> list[Any]:
        """The completions of a row as a list of texts and conversations, checked without being tokenised."""
        if missing := [column for column in self.columns if column not in row]:
            raise ValueError(
                f"{where} has no column {missing[0]!r}, only {list(row)}. Name the columns in expert_completions_column, "
                "expert_logprobs_column and expert_sources_column."
            )
        value = row[self.completions_column]
        if value is None:
            return []
        if isinstance(value, str) or _is_conversation(value):
            value = [value]  # a single one
        if not isinstance(value, Sequence):
            raise ValueError(
                f"{where} has {preview(value)} of type {type(value).__name__} in {self.completions_column!r}, expected a list of "
                "texts or of conversations, which may be empty, or None."
            )
        kinds = set()
        for number, completion in enumerate(value):
            which = f"{where}, completion {number} in {self.completions_column!r}"
            if not isinstance(completion, str) and not _is_conversation(completion):
                raise ValueError(
                    f"{which} is {preview(completion)} of type {type(completion).__name__}, expected a text or a conversation."
                )
            kinds.add(isinstance(completion, str))
            if not isinstance(completion, str):
                self._check_conversation(row, completion, which)
            if self._is_blank(completion if isinstance(completion, str) else completion[0]["content"]):
                raise EmptyCompletionError(
                    f"{which} is {preview(completion)}, which has no text: there is nothing to learn from it. Leave it out."
                )
        if len(kinds) > 1:
            raise ValueError(f"{where} has texts and conversations in {self.completions_column!r}, expected one kind.")
        return list(value)

    def _warn_of_two_ends(self, text: str) -> None:
        """A base model often ends with another token than its chat template."""
        last = next((token for token in self._special_tokens if text.rstrip().endswith(token)), None)
        if last is not None and self.tokenizer.convert_tokens_to_ids(last) not in self.eos_token_ids:
            end = self.tokenizer.decode(self.eos_token_ids[0])
            warnings.warn(
                f"Expert completions end with {last!r}, which ends no rollout of the policy, so that its end token {end!r} is put behind it: the policy "
                f"learns to write both. Set `eos_token` of its tokenizer (processing_class) to {last!r}, or leave {last!r} out of the completions.",
                stacklevel=5,
            )

    def _check_conversation(self, row: Mapping[str, Any], completion: Sequence[Mapping], which: str) -> None:
        if isinstance(row["prompt"], str):
            raise ValueError(
                f"{which} is a conversation, but the prompt is a text. Give the completion as a text, or the prompt as a conversation."
            )
        message = completion[0]
        if len(completion) != 1 or message.get("role") != "assistant" or not isinstance(message.get("content"), str):
            raise ValueError(
                f"{which} is {preview(completion)}, expected one message with the role 'assistant' and a text as its content."
            )

    @cached_property
    def _special_tokens(self) -> list[str]:
        return self.tokenizer.all_special_tokens  # made anew each time that it is asked for

    def _is_blank(self, text: str) -> bool:
        """Whether nothing is left but blanks and special tokens."""
        for token in self._special_tokens:
            text = text.replace(token, "")
        return not text.strip()

    def _aligned(self, row: Mapping[str, Any], column: str | None, number: int, where: str) -> list[Any]:
        """The entries of an optional column, one per completion; None where there is no column or no value."""
        value = None if column is None else row[column]
        if value is None:
            return [None] * number
        is_numbers = isinstance(value, Sequence) and bool(value) and isinstance(value[0], (int, float))
        if isinstance(value, str) or (is_numbers and column == self.logprobs_column):
            value = [value]  # that of a single completion
        if not isinstance(value, Sequence) or len(value) != number:
            size = f"{len(value)} entries" if isinstance(value, Sequence) else repr(value)
            raise ValueError(f"{where} has {size} in {column!r}, expected one for each of its {number} completions.")
        return list(value)

    def _text(self, prompt: Any, completion: Any, which: str) -> str:
        """What follows the prompt if the policy answers with this completion."""
        if isinstance(completion, str):
            return completion
        text, prefix = self.render([*prompt, *completion], False), self.render(prompt, True)
        content = completion[0]["content"]
        if not text.startswith(prefix):
            shown = text[max(text.rfind(content), 0) :]
            raise ValueError(
                f"{which}: the chat template shows the prompt as {prefix[-PREVIEW:]!r} before an answer, but a conversation with this "
                f"answer does not begin so. Give the completion as a text: all that follows the prompt, such as {shown[-PREVIEW:]!r}."
            )
        answer = text[len(prefix) :]
        # Some templates end the prompt with the first words of every answer, such as `<think>`.
        if "".join(content.split()) not in "".join(text[-len(content) - len(answer) :].split()):
            raise ValueError(
                f"{which}: the chat template shows only {preview(answer)} of {preview(content)}; some templates leave thoughts out. "
                "Give the completion as a text: all that follows the prompt."
            )
        return answer

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text up to its end token, which is appended where there is none."""
        if not texts:
            return []
        lead, *rows = self._ids([self._lead, *(self._lead + text for text in texts)])
        rows = [
            ids[len(lead) :] if ids[: len(lead)] == lead else self._ids([text])[0]
            for ids, text in zip(rows, texts, strict=True)
        ]
        ends = [next((i for i, token in enumerate(ids) if token in self.eos_token_ids), None) for ids in rows]
        return [
            [*ids, self.eos_token_ids[0]] if end is None else ids[: end + 1]
            for ids, end in zip(rows, ends, strict=True)
        ]

    @cached_property
    def _lead(self) -> str:
        """What is read before each text: a new line, if the tokenizer puts a blank before the first word of whatever it reads, as those of SentencePiece's
        kind do, since no blank stands between prompt and completion; else nothing."""
        head, whole, word = self._ids(["\n", "\na", "a"])
        adds_blank = whole[: len(head)] == head and whole[len(head) :] not in ([], word)
        return "\n" if adds_blank else ""

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(text=texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def _check_logps(self, logps: Any, token_ids: Collection[int], which: str) -> None:
        if logps is None:
            if self.needs_logps:
                raise ValueError(
                    f"{which} has no log-probabilities in {self.logprobs_column!r}, which injection_correction weighs it by. Give them, "
                    "leave the completion out, or give the trainer an `expert_model` that scores it."
                )
            return
        if not isinstance(logps, Sequence) or len(logps) != len(token_ids):
            size = f"{len(logps)} log-probabilities" if isinstance(logps, Sequence) else repr(logps)
            raise ValueError(
                f"{which} has {size} in {self.logprobs_column!r}, expected one for each of its {len(token_ids)} tokens under the policy's "
                "tokenizer, the end token included. Use None where they are not known."
            )
        for position, logp in enumerate(logps):
            if (
                isinstance(logp, bool)
                or not isinstance(logp, (int, float))
                or not (math.isfinite(logp) and logp <= 1e-6)
            ):
                raise ValueError(
                    f"{which} has the log-probability {logp!r} at token {position} in {self.logprobs_column!r}, expected a finite number "
                    "of at most 0. Use None for the whole completion where they are not known."
                )


def _is_conversation(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and all(isinstance(message, Mapping) for message in value)
