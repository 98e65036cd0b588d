"""A local expert that is asked now and then: each row goes its own pace, and the expert reads what was written since it was last asked for it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trl_selective.engines.coin import uniforms_of
from trl_selective.functional.mixed_policy import token_probs
from trl_selective.sampling.draw import inverse_cdf
from trl_selective.sampling.kv import CachedModel, RaggedContext, can_forget_tokens, distinct_texts, left_pad


class ReadingExpert:
    """The expert with a cache of the rows of one rollout.

    Rows that are not asked get columns without text in the cache, holes as those of rejected drafts, which only full attention can mask out.

    Args:
        expert: the model.
        prompt_ids: of the rows.
        max_completion_length: tokens of a completion.
        vocab_size: ids from here on are never drawn.
        pad_token_id: any valid id, for padding.
        temperature: divides the logits.

    Raises:
        ValueError: if the expert's cache cannot have holes.
    """

    def __init__(
        self,
        expert: nn.Module,
        prompt_ids: Sequence[Sequence[int]],
        *,
        max_completion_length: int,
        vocab_size: int,
        pad_token_id: int,
        temperature: float,
    ):
        check_reader(expert)
        max_tokens = max(map(len, prompt_ids)) + max_completion_length
        self.model, self.device = CachedModel(expert, "expert", max_tokens), next(expert.parameters()).device
        self.vocab_size, self.pad_token_id, self.temperature = vocab_size, pad_token_id, temperature
        self.rows = list(range(len(prompt_ids)))  # which are in the cache, in order
        self._read_prompts(prompt_ids, max_completion_length)

    def _read_prompts(self, prompt_ids: Sequence[Sequence[int]], max_completion_length: int) -> None:
        texts, text_of = distinct_texts(prompt_ids)
        ids, mask = left_pad(texts, self.pad_token_id, self.device)
        self.context = RaggedContext(mask.sum(1) + 1 + max_completion_length)
        if ids.shape[1]:
            self.model.read_text(ids, *self.context.extended(mask))
            self.context.append(mask)
        self._keep(text_of)

    def draw(self, rows: Sequence[int], texts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[int]:
        """The next token of these rows.

        Args:
            rows: by their number among the prompts.
            texts: all of them, prompt and completion so far.
            seeds: one 63-bit number for each token.
        """
        at = [self.rows.index(row) for row in rows]
        lengths = self.context.lengths.tolist()
        new: list[Sequence[int]] = [[]] * len(self.rows)
        for place, text in zip(at, texts, strict=True):
            new[place] = text[lengths[place] :]
        ids, mask = left_pad(new, self.pad_token_id, self.device)
        logits = self.model.read(ids, *self.context.extended(mask), num_logits=1)[at, -1]
        self.context.append(mask)
        if (columns := self.context.repacking()) is not None:
            self.model.keep_columns(columns)
        probs = token_probs(logits[:, : self.vocab_size], self.temperature)
        return inverse_cdf(probs, uniforms_of(torch.tensor(seeds, device=self.device))).tolist()

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows will be asked for again, at least one."""
        kept = [place for place, row in enumerate(self.rows) if row in set(rows)]
        if len(kept) < len(self.rows):
            self.rows = [self.rows[place] for place in kept]
            self._keep(kept)

    def _keep(self, places: list[int]) -> None:
        index = torch.tensor(places, device=self.device)
        self.context.keep_rows(index)
        self.model.keep_rows(index)


def check_reader(expert: nn.Module) -> None:
    """Refuse an expert whose cache cannot have holes.

    Raises:
        ValueError: naming it.
    """
    config: Any = expert.config
    if not can_forget_tokens(config):
        raise ValueError(
            f"The expert's cache ({type(expert).__name__}, {config.model_type}) cannot leave out columns, which a local expert needs beside a "
            "policy in vLLM. Serve the expert with `vllm serve` and set expert_model_server_url, or set use_vllm=False."
        )
