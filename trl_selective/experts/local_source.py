"""Whole completions of an expert in this process, with their log-probabilities."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trl_selective.experts.completions import CompletionReader, EmptyCompletionError
from trl_selective.experts.local import Expert
from trl_selective.experts.scoring import completion_logps
from trl_selective.experts.sources import Completion, Sampling
from trl_selective.grading import Conversation, as_completion
from trl_selective.sampling.unguided import encode_prompt, end_token_ids, sample_completions, seeded_uniforms

DECIMALS = 6  # of a log-probability: float32 has no more that mean anything


@dataclass
class LocalSource:
    """A model in this process, which draws from its full distribution.

    The batch size changes what is drawn no more than rounding does.

    Args:
        model: in evaluation mode, as `load_expert` returns it.
        tokenizer: the model's; with a chat template if prompts are conversations.
        name: what it is called in the dataset.
        sampling: how it draws.
        policy_tokenizer: log-probabilities are given where this tokenizer reads a text as the tokens that were drawn.
        batch_size: completions generated at once, but never fewer than those of one prompt.
        chat_template_kwargs: further arguments of the expert's chat template, for conversations.

    Raises:
        ValueError: if the expert has no end token.
    """

    model: Expert
    tokenizer: PreTrainedTokenizerBase
    name: str
    sampling: Sampling
    policy_tokenizer: PreTrainedTokenizerBase
    batch_size: int = 32
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self):
        self._ends = end_token_ids(self.model.generation_config, self.tokenizer)
        if not self._ends:
            raise ValueError(
                f"The expert {self.name!r} has no end token, so that no completion of it would be whole. Set `eos_token` of its tokenizer."
            )
        self._reader = CompletionReader(
            tokenizer=self.policy_tokenizer,
            eos_token_ids=[self.policy_tokenizer.eos_token_id],
            max_completion_length=self.sampling.max_completion_length,
            completions_column="completion",
            logprobs_column=None,
            sources_column=None,
            overlong="truncate",  # a longer answer is an answer too; it has no log-probabilities, being other tokens than those drawn
            needs_logps=False,
            render=lambda messages, is_prompt: self.policy_tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=is_prompt
            ),
        )

    @property
    def settings(self) -> dict[str, Any]:
        policy = {"policy_tokenizer": self.policy_tokenizer.name_or_path, "eos_token": self.policy_tokenizer.eos_token}
        template = {"chat_template_kwargs": dict(self.chat_template_kwargs or {})}
        return {"expert": self.name, **policy, **asdict(self.sampling), **template}

    def complete(self, prompts: Sequence[str | Conversation], first: int) -> Iterator[list[Completion]]:
        """The completions of each prompt from index `first` on, in order.

        Batches begin at fixed rows. A run that goes on within one draws it again, so that its figures are the same to the last digit.

        Raises:
            ValueError: if the policy's chat template cannot show an answer.
        """
        rows = max(1, self.batch_size // self.sampling.num_completions)
        for start in range(0, len(prompts), rows):
            end = min(start + rows, len(prompts))
            if end > first:
                yield from self._answer(prompts[start:end], start)[max(0, first - start) :]

    def _answer(self, prompts: Sequence[str | Conversation], start: int) -> list[list[Completion]]:
        """The completions of a batch of prompts, of which the first is that of row `start`."""
        num, temperature = self.sampling.num_completions, self.sampling.temperature
        rows = [row for row in range(len(prompts)) for _ in range(num)]
        prompt_ids = [encode_prompt(self.tokenizer, prompts[row], self.chat_template_kwargs) for row in rows]
        shape = self.sampling.num_completions, self.sampling.max_completion_length
        drawn = sample_completions(
            self.model,
            prompt_ids,
            max_completion_length=self.sampling.max_completion_length,
            eos_token_ids=self._ends,
            pad_token_id=self._ends[0],
            temperature=temperature,
            uniforms=torch.cat(
                [seeded_uniforms(self.sampling.seed_of(start + row), *shape) for row in range(len(prompts))]
            ),
        )
        texts = [self._text(ids) for ids in drawn]
        read = [
            None if text is None else self._read_back(prompts[row], text, f"Row {start + row}")
            for row, text in zip(rows, texts, strict=True)
        ]
        has_logps = [ids == again for ids, again in zip(drawn, read, strict=True)]
        scored = [list(compress(token_ids, has_logps)) for token_ids in (prompt_ids, drawn)]
        logps = iter(completion_logps(self.model, *scored, temperature=temperature))
        answers = [
            Completion(
                text or "",
                is_whole=again is not None,
                token_ids=ids,
                logps=[round(logp, DECIMALS) for logp in next(logps).tolist()] if is_scored else None,
            )
            for text, ids, again, is_scored in zip(texts, drawn, read, has_logps, strict=True)
        ]
        return [answers[first : first + num] for first in range(0, len(answers), num)]

    def _text(self, token_ids: list[int]) -> str | None:
        """What stands before the end token; None if there is no end, or nothing before it."""
        said = token_ids[:-1]
        is_blank = not self.tokenizer.decode(said, skip_special_tokens=True).strip()
        if token_ids[-1] not in self._ends or is_blank:
            return None
        return self.tokenizer.decode(said, clean_up_tokenization_spaces=False)

    def _read_back(self, prompt: str | Conversation, text: str, where: str) -> list[int] | None:
        """The tokens that the policy reads in the stored completion; None if it reads nothing, as behind an end token of its own."""
        try:
            (read,) = self._reader.read({"prompt": prompt, "completion": [as_completion(prompt, text)]}, where)
        except EmptyCompletionError:
            return None
        except ValueError as error:
            raise ValueError(
                f"{error} Here that means: use prompts that are texts, or the tokenizer of another policy."
            ) from error
        return list(read.token_ids)
