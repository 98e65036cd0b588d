"""The rows that are still being written. Finished rows leave the batch, and both caches with it: they cost nothing more."""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trl_selective.rollout import GuidedRollout
from trl_selective.sampling.draw import position_noise
from trl_selective.sampling.kv import CachedModel, RaggedContext, left_pad


class LiveRows:
    """The live rows of one call of `GuidedSampler.sample` (terms as defined there), and the record of all rows.

    Attributes:
        policy, expert: the models with their caches of the live rows.
        context: what both have read, in columns shared by both caches.
        pending, pending_mask: (live, columns) tokens that neither has read, padded on the left.
        position: (live,) tokens drawn so far.
        num_drafted: counter for the samplers that draft.
    """

    def __init__(
        self,
        policy: nn.Module,
        expert: nn.Module,
        prompt_ids: Sequence[Sequence[int]],
        pad_token_id: int,
        max_completion_length: int,
        eos_token_ids: Collection[int],
    ):
        device = next(policy.parameters()).device
        num_rows = len(prompt_ids)
        self.policy, self.expert = CachedModel(policy, "policy"), CachedModel(expert, "expert")
        self.pending, self.pending_mask = left_pad(prompt_ids, pad_token_id, device)
        self.context = RaggedContext(self.pending_mask.sum(1) + max_completion_length)
        self.position = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.num_drafted = 0

        self._max_length = max_completion_length
        self._eos_token_ids = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=device)
        self._noise = position_noise(num_rows, max_completion_length, device)
        self._row = torch.arange(num_rows, device=device)  # which row of the record each live row is
        self._lengths = torch.zeros_like(self._row)
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

    def __len__(self) -> int:
        return len(self._row)

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

    def read(
        self, model: CachedModel, block: Int[Tensor, "live new"], block_mask: Int[Tensor, "live new"], num_logits: int
    ):
        """Logits of the last `num_logits` positions of a block that follows the context."""
        mask, position_ids = self.context.extended(block_mask)
        return model.read(block, mask, position_ids, num_logits)

    def commit(self, count: Int[Tensor, "live"], completion_ids: Int[Tensor, "live num"], **record: Tensor) -> None:
        """Make the first `count` of the tokens drawn part of each row, up to its end token or its last position.

        Both models must have read the pending tokens and `completion_ids[:, :-1]`; what is not committed becomes a hole in their caches.
        Rows that end leave the batch.

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

        last = (count - 1)[:, None]
        read_mask = torch.cat([self.pending_mask, (offsets[:-1] < last).long()], dim=1)
        self.context.append(read_mask)
        self.pending = completion_ids.gather(1, last)
        self.pending_mask = torch.ones_like(self.pending)
        self.position = self.position + count
        self._lengths[self._row] = self.position
        self._retire(is_end.any(1) | (self.position == self._max_length))

    def _retire(self, finished: Bool[Tensor, "live"]) -> None:
        kept = (~finished).nonzero().squeeze(1)
        if len(kept) == len(self):
            return
        self._row, self.position = self._row[kept], self.position[kept]
        if len(self):
            self.pending, self.pending_mask = self.pending[kept], self.pending_mask[kept]
            for rows in (self.context, self.policy, self.expert):
                rows.keep_rows(kept)

    def repack(self) -> None:
        """Remove holes from both caches where that pays. Only for caches of full attention (`can_forget_tokens`)."""
        if len(self) and (columns := self.context.repacking()) is not None:
            self.policy.keep_columns(columns)
            self.expert.keep_columns(columns)

    def to_rollout(self) -> GuidedRollout:
        """The record of all rows, on the host."""
        lengths = self._lengths.tolist()
        fields = {
            name: [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]
            for name, values in self._record.items()
        }
        return GuidedRollout(
            **fields,
            policy_forwards=self.policy.row_forwards,
            expert_forwards=self.expert.row_forwards,
            num_drafted=self.num_drafted,
        )
