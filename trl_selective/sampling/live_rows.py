"""The rows that are still being written. Finished rows leave the batch, and both caches with it: they cost nothing more."""

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trl_selective.rollout import GuidedRollout
from trl_selective.sampling.draw import position_noise
from trl_selective.sampling.graphs import cached_model
from trl_selective.sampling.kv import CachedModel, NoModel, RaggedContext, distinct_texts, left_pad


@dataclass(frozen=True)
class Stop:
    """Where rows stand between two tokens: with the record, enough to go on from.

    Attributes:
        row: (rows,) which rows of the record, guided ones first.
        position: (rows,) tokens drawn of each.
        num_behind: how many of the last tokens before the pending one the expert has not read.
    """

    row: Tensor
    position: Tensor
    num_behind: int

    def halves(self) -> list["Stop"]:
        return [Stop(self.row[first::2], self.position[first::2], self.num_behind) for first in (0, 1)]


class LiveRows:
    """The live rows of one call of `GuidedSampler.sample` (terms as defined there), and the record of all rows.

    Guided rows come first: the expert reads these alone. All rows wait until the first `advance`, and are live from then on, unless memory runs
    out.

    Attributes:
        policy, expert: the models with their caches of the live rows, of the guided ones in the case of the expert. An expert that is None
            reads nothing; it is given `texts`.
        num_guided: rows that are guided.
        context: what the policy has read, in columns shared by both caches.
        backlog: (live, columns) the last tokens of the context, which the expert has not read.
        pending: (live, 1) the token behind the context, which neither has read.
        position: (live,) tokens drawn so far.
        num_drafted: counter for the samplers that draft.
    """

    def __init__(
        self,
        policy: nn.Module,
        expert: nn.Module | None,
        prompt_ids: Sequence[Sequence[int]],
        pad_token_id: int,
        max_completion_length: int,
        eos_token_ids: Collection[int],
        is_guided: Sequence[bool],
    ):
        device = next(policy.parameters()).device
        num_rows = len(prompt_ids)
        self._models, self._prompt_ids, self._pad_token_id = (policy, expert), prompt_ids, pad_token_id
        self._is_guided = is_guided
        self.num_drafted = 0

        self._policy_forwards = self._expert_forwards = 0
        self._max_length = max_completion_length
        self._eos_token_ids = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=device)
        self._noise = position_noise(num_rows, max_completion_length, device)
        order = torch.tensor(sorted(range(num_rows), key=lambda row: not is_guided[row]), device=device)
        self._waiting = [Stop(order, torch.zeros_like(order), num_behind=0)]
        self._row = order[:0]  # which row of the record each live row is
        self._lengths = torch.zeros_like(order)
        # One column more than there are positions: drafts beyond the last position are written there, and never read.
        shape = (num_rows, max_completion_length + 1)
        self._record = {
            "completion_ids": torch.zeros(shape, dtype=torch.long, device=device),
            "sampling_per_token_logps": torch.zeros(shape, device=device),
            "policy_per_token_logps": torch.zeros(shape, device=device),
            "guidance_weights": torch.zeros(shape, device=device),
            "entropies": torch.zeros(shape, device=device),
            "expert_drawn": torch.zeros(shape, dtype=torch.bool, device=device),
        }

    @property
    def are_done(self) -> bool:
        """Whether all rows have ended."""
        return not len(self) and not self._waiting

    def advance(self, step: Callable[[], None]) -> None:
        """Let `step` draw and commit tokens of live rows. Where memory does not suffice for all of them, half of them wait until the others have
        ended: a token depends on its text and its own numbers alone (`draw.py`), so that no row changes by it, but for rounding.

        Raises:
            torch.OutOfMemoryError: if it does not suffice for a single row.
        """
        stop = Stop(self._row, self.position, self.backlog.shape[1]) if len(self) else self._waiting.pop()
        try:
            if not len(self):
                self._go_on_from(stop)
            step()
            return
        except torch.OutOfMemoryError:
            if len(stop.row) == 1:
                raise
        # Here the exception is gone, and with it what its frames held.
        warnings.warn(
            f"Out of memory with {len(stop.row)} rollouts drawn at once: half of them wait until the others have ended. The rollouts are the same, "
            "but take longer. Fewer are drawn at once with a smaller per_device_train_batch_size or steps_per_generation; with use_vllm=True "
            "vLLM sees to it.",
            stacklevel=2,
        )
        if stop.row.is_cuda:
            torch.cuda.synchronize(stop.row.device)  # what was begun aside is done with the caches
        self._row = self._row[:0]
        self._waiting += stop.halves()

    def _go_on_from(self, stop: Stop) -> None:
        """Rows become live: the models read their texts up to the last tokens, and each text but once."""
        rows, device = stop.row.tolist(), stop.row.device
        policy, expert = self._models
        max_lengths = [len(self._prompt_ids[row]) + self._max_length for row in rows]
        self.policy = cached_model(policy, "policy", max(max_lengths))
        self.expert = NoModel() if expert is None else cached_model(expert, "expert", max(max_lengths))
        self._row, self.position = stop.row, stop.position
        self.num_guided = sum(self._is_guided[row] for row in rows)

        written = self._written(stop.row, stop.position)
        texts, text_of = distinct_texts(written)
        ids, mask = left_pad(texts, self._pad_token_id, device)
        context = RaggedContext(mask.sum(1) + 1)
        num_read = ids.shape[1] - stop.num_behind
        if ids.shape[1]:
            block = ids, *context.extended(mask)
            self.policy.read_text(*block)
            num_texts = len(set(text_of[: self.num_guided]))  # the first ones
            if num_texts and num_read:
                self.expert.read_text(*(part[:num_texts, :num_read] for part in block))
            context.append(mask)
        index = torch.tensor(text_of, device=device)
        self._keep_rows(index, context)
        # Of rows, not of texts: one text may be a prompt here, and there a prompt with a completion.
        self.context, self.context.max_lengths = context, torch.tensor(max_lengths, device=device)
        self.pending = torch.tensor([[text[-1]] for text in written], device=device)
        self.backlog = ids[index, num_read:]
        self._expert_has_read = False  # the pending tokens

    def _keep_rows(self, rows: Int[Tensor, "kept"], context: RaggedContext) -> None:
        """Of context and caches, whose guided rows are to be the first `num_guided` of these."""
        context.keep_rows(rows)
        self.policy.keep_rows(rows)
        if self.num_guided:
            self.expert.keep_rows(rows[: self.num_guided])

    def __len__(self) -> int:
        return len(self._row)

    @property
    def is_guided(self) -> Bool[Tensor, "live 1"]:
        """Whether the expert guides a row."""
        return torch.arange(len(self), device=self._row.device).unsqueeze(1) < self.num_guided

    @property
    def tokens_left(self) -> int:
        """Positions that the row with the fewest tokens may still fill."""
        return self._max_length - int(self.position.min())

    def positions(self, num: int) -> Int[Tensor, "live num"]:
        """The next `num` positions of each row; beyond the last one, the last one again."""
        ahead = self.position[:, None] + torch.arange(num, device=self.position.device)
        return ahead.clamp(max=self._max_length - 1)

    def noise(self, positions: Int[Tensor, "live num"], kind: int) -> Float[Tensor, "live num"]:
        """The uniforms of these positions, `kind` one of DRAFT, ACCEPT, REPLACE."""
        return self._noise[self._row[:, None], positions, kind]

    def ends(
        self, completion_ids: Int[Tensor, "live num"], positions: Int[Tensor, "live num"]
    ) -> Bool[Tensor, "live num"]:
        """Whether a row ends with the token at this position."""
        return torch.isin(completion_ids, self._eos_token_ids) | (positions == self._max_length - 1)

    @property
    def num_prepared(self) -> int:
        """Forwards so far whose times say nothing about the next ones."""
        return self.policy.num_prepared + self.expert.num_prepared

    def read_by_policy(self) -> Float[Tensor, "live 1 vocab"]:
        """The policy reads the pending tokens: its logits behind them."""
        return self.draft_by_policy(self.pending, *self.context.extended(torch.ones_like(self.pending)))

    def draft_by_policy(self, token_ids: Int[Tensor, "live 1"], mask: Tensor, position_ids: Tensor):
        """The policy reads one more token of each row, with a mask and positions that go beyond the context: its logits behind it."""
        self._policy_forwards += self.num_guided
        return self.policy.read(token_ids, mask, position_ids, num_logits=1)

    def read_by_expert(
        self, drafts: Int[Tensor, "live drafts"], num_logits: int
    ) -> Float[Tensor, "guided num_logits vocab"]:
        """In guided rows, the expert reads its backlog, the pending tokens and drafts: its logits behind the last `num_logits` of these."""
        return self._begin_by_expert(drafts, num_logits)()

    def read_by_both(
        self, token_ids: Int[Tensor, "live 1"], mask: Tensor, position_ids: Tensor, drafts: Tensor, num_logits: int
    ) -> tuple[Float[Tensor, "live 1 head"], Float[Tensor, "guided num_logits expert_head"]]:
        """`draft_by_policy` and `read_by_expert`, side by side where the device can."""
        expert_logits = self._begin_by_expert(drafts, num_logits)
        try:
            policy_logits = self.draft_by_policy(token_ids, mask, position_ids)
        finally:
            logits = expert_logits()
        return policy_logits, logits

    def _begin_by_expert(
        self, drafts: Int[Tensor, "live drafts"], num_logits: int
    ) -> Callable[[], Float[Tensor, "guided num_logits vocab"]]:
        """Start `read_by_expert`, and return a function that gives its logits (`CachedModel.begin`)."""
        block = torch.cat([self.backlog, self.pending, drafts], dim=1)
        behind = self.backlog.shape[1]
        extended = self.context.extended(torch.ones_like(block[:, behind:]), behind)
        self.backlog, self._expert_has_read = self.backlog[:, :0], True
        if not self.num_guided:
            return lambda: torch.empty(0, num_logits, 0, device=block.device)
        self._expert_forwards += self.num_guided
        block, mask, position_ids = (part[: self.num_guided] for part in (block, *extended))
        assert isinstance(self.expert, CachedModel), "an expert that is not here reads `texts`"
        return self.expert.begin(block, mask, position_ids, num_logits)

    def texts(self, rows: Sequence[int]) -> list[list[int]]:
        """Prompts and completions so far of these live rows, for an expert that reads them elsewhere: one forward each."""
        self._expert_forwards += len(rows)
        return self._written(self._row[rows], self.position[rows])

    def _written(self, row: Int[Tensor, "rows"], position: Int[Tensor, "rows"]) -> list[list[int]]:
        """Prompts and completions up to these positions."""
        lengths = position.tolist()
        completions = self._record["completion_ids"][:, : max(lengths)][row].tolist()
        return [
            [*self._prompt_ids[number], *completion[:length]]
            for number, completion, length in zip(row.tolist(), completions, lengths, strict=True)
        ]

    def commit(self, count: Int[Tensor, "live"], completion_ids: Int[Tensor, "live num"], **record: Tensor) -> None:
        """Make the first `count` of the tokens drawn part of each row, up to its end token or its last position.

        The policy must have read the pending tokens and `completion_ids[:, :-1]`; what is not committed becomes a hole in its cache. So must
        the expert, unless `completion_ids` is a single column: then the pending tokens may go to its backlog. Rows that end leave the batch.

        Args:
            count: at least 1 each.
            completion_ids: the tokens drawn.
            record: the other fields of `GuidedRollout`, (live, num).
        """
        num = completion_ids.shape[1]
        offsets = torch.arange(num, device=count.device)
        is_end = torch.isin(completion_ids, self._eos_token_ids) & (offsets < count[:, None])
        count = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, count)
        count = torch.minimum(count, self._max_length - self.position)

        # Tokens beyond `count` are written as well, and overwritten later or cut off by the row's length: this avoids a
        # synchronising boolean index.
        columns = (self.position[:, None] + offsets).clamp(max=self._max_length)
        for name, values in {"completion_ids": completion_ids, **record}.items():
            self._record[name][self._row[:, None], columns] = values

        if not self._expert_has_read:
            self.backlog = torch.cat([self.backlog, self.pending], dim=1)
        self._expert_has_read = False
        last = (count - 1)[:, None]
        self.context.append(torch.cat([torch.ones_like(last), (offsets[:-1] < last).long()], dim=1))
        self.pending = completion_ids.gather(1, last)
        self.position = self.position + count
        self._lengths[self._row] = self.position
        self._retire(is_end.any(1) | (self.position == self._max_length))

    def _retire(self, finished: Bool[Tensor, "live"]) -> None:
        kept = (~finished).nonzero().squeeze(1)
        if len(kept) == len(self):
            return
        self._row, self.position = self._row[kept], self.position[kept]
        self.num_guided = int((kept < self.num_guided).sum())
        if len(self):
            self.backlog, self.pending = self.backlog[kept], self.pending[kept]
            self._keep_rows(kept, self.context)

    def repack(self) -> None:
        """Remove holes from both caches where that pays, and where both can forget."""
        can_forget = self.policy.can_forget and self.expert.can_forget
        if can_forget and len(self) and (columns := self.context.repacking()) is not None:
            self.policy.keep_columns(columns)
            if self.num_guided:
                self.expert.keep_columns(columns[: self.num_guided])

    def recorded(self, name: str, positions: Int[Tensor, "rows num"]) -> Tensor:
        """A field of the record at these positions of the first rows."""
        return self._record[name][self._row[: len(positions), None], positions]

    def amend(self, name: str, positions: Int[Tensor, "rows num"], values: Tensor) -> None:
        """Write a field of the record anew, at positions of the first rows that were committed."""
        self._record[name][self._row[: len(positions), None], positions] = values

    def to_rollout(self) -> GuidedRollout:
        """The record of all rows, on the host."""
        lengths = self._lengths.tolist()
        fields: dict[str, Any] = {
            name: [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]
            for name, values in self._record.items()
        }
        return GuidedRollout(
            **fields,
            policy_forwards=self._policy_forwards,
            expert_forwards=self._expert_forwards,
            num_drafted=self.num_drafted,
            is_scored=not isinstance(self.expert, NoModel),
        )
