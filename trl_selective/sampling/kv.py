"""KV caches for rows that accept different numbers of tokens.

Rejected tokens are not removed from a cache: their columns become *holes*, masked out in a 2-D attention mask, while explicit position ids
count only the text of the row. Attention over such a cache is exact (the logits equal those of a fresh forward). When holes pile up the
cache is repacked: the text of every row is moved to the right, as if it had been left-padded.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 256  # columns that a cache grows by, or by an eighth of its own, if that is more, but not beyond what is needed at most
STEP = 64  # of which room is a multiple: kernels read rows whose ends are aligned, and there are fewer shapes
REPACK_ABOVE = 1.25  # columns per token of the longest row, beyond which a repack pays
COUNT_COLUMNS = (
    "gpt_neo",
    "mpt",
)  # model types whose local windows or ALiBi count the columns of the cache, holes included
MAX_BLOCK = 2**15  # tokens of all rows that are read at once of texts: their activations take memory beside the cache
MIN_WIDTH = 256  # tokens of a row in such a block, at least
OPTIONAL_ARGUMENTS = {"position_ids", "logits_to_keep"}  # passed to a model's forward where it takes them


def can_forget_tokens(config: PretrainedConfig) -> bool:
    """Whether the model's cache can mask out rejected tokens: full attention in every layer, by positions. No sliding window, no recurrent
    state, no distances counted in columns."""
    return config.model_type not in COUNT_COLUMNS and _layer_kinds(config) <= {DynamicLayer}


def has_attention(config: PretrainedConfig) -> bool:
    """Whether any layer attends to what was read. Models of recurrent layers alone have caches of their own, with rules of their own for padding."""
    return any(issubclass(kind, DynamicLayer) for kind in _layer_kinds(config))


def loses_its_state(config: PretrainedConfig) -> bool:
    """Whether the model may start anew at a block of several tokens that goes on from a cache, as several with recurrent layers do, some only in
    older versions of Transformers. Single tokens are what they were made for."""
    return not _layer_kinds(config) <= {DynamicLayer, DynamicSlidingWindowLayer}


def _layer_kinds(config: PretrainedConfig) -> set[type]:
    """The types of the layers in the cache that Transformers makes for this model."""
    return {type(layer) for layer in DynamicCache(config=config).layers}


def optional_arguments(model: nn.Module) -> set[str]:
    """Which of `OPTIONAL_ARGUMENTS` the model takes."""
    return OPTIONAL_ARGUMENTS & _parameters(model).keys()


def cache_name(model: nn.Module) -> str:
    """What the model calls its cache, among its arguments and in its output. Transformers 5.24 gave it another name."""
    return "cache" if "cache" in _parameters(model) else "past_key_values"


def fixed_arguments(model: nn.Module) -> dict[str, Any]:
    """What a forward is told beside its block: that no load of experts (MoE) has to be balanced, which cannot be done behind a cache."""
    name, parameters = "output_router_logits", _parameters(model)
    is_taken = name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    config: PretrainedConfig = model.config
    return {name: False} if is_taken and hasattr(config.get_text_config(), name) else {}


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of the model's forward, seen through PEFT, compilation, and wrappers that take whatever it takes."""
    model = getattr(model, "get_base_model", lambda: model)()
    parameters = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    is_opaque = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())
    inner = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)
    return _parameters(inner) if is_opaque and inner is not model else parameters


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer with room for more: new tokens are written behind the text, which `DynamicLayer` copies each time.

    Args:
        max_columns: room for more is made only when it is used.

    Attributes:
        columns: where the next tokens are written, on the device; all columns are returned then, with or without text. None: behind the text.
    """

    columns: Int[Tensor, "new"] | None = None

    def __init__(self, max_columns: int):
        super().__init__()
        self.max_columns = max_columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        # Keys and values are their first columns.
        self._buffers = [states[:, :, :0] for states in (key_states, value_states)]
        self.show(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new_states = key_states, value_states
        if self.columns is not None:
            for buffer, new in zip(self._buffers, new_states, strict=True):
                buffer.index_copy_(2, self.columns, new)
            keys, values = self._buffers
            return keys, values
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        self.reserve(end)
        for buffer, new in zip(self._buffers, new_states, strict=True):
            buffer[:, :, start:end] = new
        self.show(end)
        return self.keys, self.values

    @property
    def room(self) -> int:
        """Columns that can be held."""
        return self._buffers[0].shape[2]

    def reserve(self, num_columns: int) -> None:
        """Make room for this many columns, and for more if there is none. What is not text is 0, so that it can be masked out."""
        if num_columns > self.room:
            grown = max(num_columns, min(num_columns + max(ROOM, num_columns // 8), self.max_columns))
            grown += -grown % STEP
            longer = [b.new_zeros(*b.shape[:2], grown, b.shape[3]) for b in self._buffers]
            for buffer, old in zip(longer, self._buffers, strict=True):
                buffer[:, :, : old.shape[2]] = old
            self._buffers = longer
            self.show(self.keys.shape[2])  # of the new ones: the old ones are free

    def show(self, num_columns: int) -> None:
        """Count these columns as text."""
        self.keys, self.values = (buffer[:, :, :num_columns] for buffer in self._buffers)

    def reorder_cache(self, beam_idx: Int[Tensor, "kept"]) -> None:
        """Keep these rows, in this order."""
        if self.get_seq_length() == 0:
            return
        self._buffers = [buffer.index_select(0, beam_idx.to(buffer.device)) for buffer in self._buffers]
        self.show(self.keys.shape[2])

    def keep_columns(self, columns: Int[Tensor, "rows kept"]) -> None:
        """Keep, for each row, these columns, in this order, where the text was."""
        num_kept = columns.shape[1]
        index = columns[:, None, :, None].to(self.keys.device)
        for buffer in self._buffers:
            buffer[:, :, :num_kept] = buffer.gather(2, index.expand(-1, buffer.shape[1], -1, buffer.shape[3]))
        self.show(num_kept)


class CachedModel:
    """A causal language model with the cache of the rows it is reading.

    Args:
        model: the model.
        name: what it is to its reader: "policy" or "expert".
        max_tokens: that a row has in the end, prompt and completion.

    Attributes:
        can_forget: whether columns may be masked out or removed (`can_forget_tokens`).
        num_prepared: forwards so far that took longer than others, because they were the first of their kind.
    """

    num_prepared = 0

    def __init__(self, model: nn.Module, name: str, max_tokens: int):
        self.model, self.name = model, name
        self.cache: Any = None  # a transformers cache; where the model has a kind of its own, once something was read
        self.can_forget = can_forget_tokens(model.config)
        if self.can_forget:
            self.cache = DynamicCache(config=model.config)
            self.cache.layers = [RoomyLayer(int(REPACK_ABOVE * max_tokens)) for _ in self.cache.layers]
        self.takes, self.fixed, self._cache_name = optional_arguments(model), fixed_arguments(model), cache_name(model)
        self._reads_singly = loses_its_state(model.config)

    def read(
        self,
        token_ids: Int[Tensor, "rows new"],
        attention_mask: Int[Tensor, "rows columns"],
        position_ids: Int[Tensor, "rows new"],
        num_logits: int,
    ) -> Float[Tensor, "rows num_logits vocab"]:
        """Append `token_ids` to the cache and return the logits of the last `num_logits` of them. The mask covers cache and new tokens."""
        num_new, num_columns = token_ids.shape[1], attention_mask.shape[1]
        if self._reads_singly and 1 < num_new < num_columns:
            logits = [
                self.read(
                    token_ids[:, at : at + 1],
                    attention_mask[:, : num_columns - num_new + at + 1],
                    position_ids[:, at : at + 1],
                    num_logits=1,
                )
                for at in range(num_new)
            ]
            return torch.cat(logits[-num_logits:], dim=1)
        optional, cache = {"position_ids": position_ids, "logits_to_keep": num_logits}, self.cache
        output = self.model(
            input_ids=token_ids,
            attention_mask=attention_mask,
            use_cache=True,
            **{self._cache_name: cache},
            **self.fixed,
            **{key: value for key, value in optional.items() if key in self.takes},
        )
        self.cache = getattr(output, self._cache_name, None)
        goes_on = self.cache is not None and (cache is None or self.cache is cache)
        if not goes_on or (self.can_forget and not self.cache.get_seq_length()):
            raise ValueError(
                f"The {self.name} ({type(self.model).__name__}) does not go on from its `{self._cache_name}`, but guided sampling needs a cache. "
                "Turn gradient checkpointing off while sampling (`model.gradient_checkpointing_disable()`; the trainer does it by itself), and "
                "use a model that fills the cache that it is given."
            )
        return output.logits[:, -num_logits:]

    def read_text(
        self,
        token_ids: Int[Tensor, "rows new"],
        attention_mask: Int[Tensor, "rows new"],
        position_ids: Int[Tensor, "rows new"],
    ) -> None:
        """Begin the cache with `token_ids`, which may be many."""
        num_rows, num_new = token_ids.shape
        num_blocks = -(-num_new // max(MIN_WIDTH, MAX_BLOCK // num_rows)) if self.can_forget else 1
        end = 0
        for ids in token_ids.tensor_split(num_blocks, dim=1):
            start, end = end, end + ids.shape[1]
            self.read(ids, attention_mask[:, :end], position_ids[:, start:end], num_logits=1)

    def begin(
        self,
        token_ids: Int[Tensor, "rows new"],
        attention_mask: Int[Tensor, "rows columns"],
        position_ids: Int[Tensor, "rows new"],
        num_logits: int,
    ) -> Callable[[], Float[Tensor, "rows num_logits vocab"]]:
        """Start `read`, and return a function that gives its logits. On a GPU the forward may run beside whatever is queued next; elsewhere it
        has already run. Nothing must touch the cache before that function is called."""
        logits = self.read(token_ids, attention_mask, position_ids, num_logits)
        return lambda: logits

    def keep_rows(self, rows: Int[Tensor, "kept"]) -> None:
        """Drop all other rows from the cache."""
        if self.cache is not None:
            self.cache.reorder_cache(rows)

    def keep_columns(self, columns: Int[Tensor, "rows kept"]) -> None:
        """Keep, for each row, these columns of the cache, in this order."""
        for layer in self.cache.layers:
            layer.keep_columns(columns)


class NoModel:
    """Stands for a model that is not in this process: it reads nothing here, and has nothing to forget."""

    can_forget = True
    num_prepared = 0

    def read_text(self, *block) -> None: ...

    def keep_rows(self, rows: Int[Tensor, "kept"]) -> None: ...

    def keep_columns(self, columns: Int[Tensor, "rows kept"]) -> None: ...


class RaggedContext:
    """What two models have read of each row: the mask over the columns of both caches, and the number of tokens behind it.

    Both caches have the same columns. `mask` is 1 where a column holds text of the row, 0 for padding and holes.
    """

    def __init__(self, max_lengths: Int[Tensor, "rows"]):
        # Of prompt and completion: drafts beyond are dropped, and must not exceed a position table.
        self.max_lengths = max_lengths
        self.lengths = torch.zeros_like(max_lengths)
        self.mask = max_lengths.new_zeros(len(max_lengths), 0)

    def extended(
        self, block_mask: Int[Tensor, "rows new"], behind: int = 0
    ) -> tuple[Int[Tensor, "rows columns"], Int[Tensor, "rows tokens"]]:
        """The mask with the columns of a block appended, and the position ids of the last `behind` tokens of the context and the block."""
        last = torch.ones_like(self.lengths)[:, None].expand(-1, behind)
        steps = torch.cat([last, block_mask], dim=1).cumsum(-1)
        position_ids = (self.lengths[:, None] - behind + steps - 1).clamp(min=0)
        position_ids = torch.minimum(position_ids, self.max_lengths[:, None] - 1)
        return torch.cat([self.mask, block_mask], dim=1), position_ids

    def next_position(self, position_ids: Int[Tensor, "rows new"]) -> Int[Tensor, "rows 1"]:
        """The position id after a block."""
        return torch.minimum(position_ids[:, -1:] + 1, self.max_lengths[:, None] - 1)

    def append(self, block_mask: Int[Tensor, "rows new"]) -> None:
        """The models have read a block; its columns with mask 0 are holes."""
        self.mask = torch.cat([self.mask, block_mask], dim=1)
        self.lengths = self.lengths + block_mask.sum(-1)

    def keep_rows(self, rows: Int[Tensor, "kept"]) -> None:
        self.mask, self.lengths, self.max_lengths = self.mask[rows], self.lengths[rows], self.max_lengths[rows]

    def repacking(self) -> Int[Tensor, "rows kept"] | None:
        """The columns to keep if the holes are worth removing, else None. Afterwards the mask is the repacked one."""
        longest = int(self.lengths.max())
        if self.mask.shape[1] <= REPACK_ABOVE * longest:
            return None
        columns = self.mask.argsort(dim=1, stable=True)[:, -longest:]  # zeros first, then the text in its order
        self.mask = self.mask.gather(1, columns)
        return columns


def distinct_texts(prompt_ids: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """All but the last tokens of the prompts, each text but once, since a group of rows has one prompt; and which text each prompt has."""
    texts = [tuple(ids[:-1]) for ids in prompt_ids]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return list(numbers), [numbers[text] for text in texts]


def left_pad(
    prompt_ids: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[Int[Tensor, "rows columns"], Int[Tensor, "rows columns"]]:
    """Prompts as one tensor, padded on the left, and the mask of their tokens."""
    width = max(map(len, prompt_ids))
    ids = [[pad_token_id] * (width - len(p)) + list(p) for p in prompt_ids]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompt_ids]
    return torch.tensor(ids, dtype=torch.long, device=device), torch.tensor(mask, dtype=torch.long, device=device)
