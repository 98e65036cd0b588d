"""On a GPU, a forward of a few tokens is one CUDA graph.

A forward that reads one token for each row spends its time launching small kernels, hundreds of them, on the host. A CUDA graph launches them
all at once, but it is bound to the shapes and addresses with which it was captured. So the cache has room for more columns than there are
(all are attended to, and those without text are masked out), blocks are padded to a power of two, and rows that end stay in the cache as dead
weight until half of them are gone. Logits are those of a plain forward, to rounding.
"""

import sys
import warnings
from collections import Counter
from weakref import WeakSet

import torch
from jaxtyping import Int
from torch import Tensor, nn

from trl_selective.sampling.kv import OPTIONAL_ARGUMENTS, CachedModel, can_forget_tokens, optional_arguments

MAX_TOKENS = 64  # of a block; longer ones are bound by arithmetic
NUM_PLAIN = 1  # forwards of one shape before it is captured
_UNCAPTURABLE: WeakSet[nn.Module] = WeakSet()


def cached_model(model: nn.Module, name: str) -> CachedModel:
    """The model with a cache, and with graphs where it can have them."""
    can_have_graphs = next(model.parameters()).is_cuda and model not in _UNCAPTURABLE and has_static_forward(model)
    return GraphedModel(model, name) if can_have_graphs else CachedModel(model, name)


def has_static_forward(model: nn.Module) -> bool:
    """Whether a forward of a few tokens can be made to depend on nothing but tensors: full attention by PyTorch's kernels, with a mask that
    Transformers' `create_causal_mask` takes as it is, on one device, with weights that are not quantised."""
    base = getattr(model, "get_base_model", lambda: model)()
    module = sys.modules[type(base).__module__]
    return (
        can_forget_tokens(model.config)
        and optional_arguments(model) == OPTIONAL_ARGUMENTS
        and hasattr(module, "create_causal_mask")
        and getattr(model.config, "_attn_implementation", None) == "sdpa"
        and len(set(getattr(base, "hf_device_map", {}).values())) <= 1
        and not getattr(base, "is_quantized", False)
    )


class GraphedModel(CachedModel):
    """A `CachedModel` that reads blocks of up to `MAX_TOKENS` tokens by CUDA graphs. On a CPU it does all the same, but for the graphs."""

    def __init__(self, model: nn.Module, name: str):
        super().__init__(model, name)
        self._static: StaticForward | None = None
        self._live: Int[Tensor, live] | None = None  # which rows of the cache are live; None for all

    def read(self, token_ids, attention_mask, position_ids, num_logits):
        start, num_new = self.cache.get_seq_length(), token_ids.shape[1]
        if not start or num_new > MAX_TOKENS:
            self._drop_dead_rows()
            return super().read(token_ids, attention_mask, position_ids, num_logits)
        width = 1 << (num_new - 1).bit_length()
        if start + width > self.cache.layers[0].room:
            self._reserve(start + width)
        if self._static is None:
            self._static = StaticForward(self.model, self.cache)
        logits = self._static.read(token_ids, attention_mask, position_ids, width, self._live)
        for layer in self.cache.layers:
            layer.show(start + num_new)
        logits = logits[:, num_new - num_logits : num_new]
        return logits.clone() if self._live is None else logits[self._live]  # the next forward writes over them

    @property
    def _num_rows(self) -> int:
        return self.cache.layers[0].keys.shape[0]

    def _reserve(self, num_columns: int) -> None:
        for layer in self.cache.layers:
            layer.reserve(num_columns)
        self._static = None

    def keep_rows(self, rows: Int[Tensor, "kept"]) -> None:
        if self._static is None:
            super().keep_rows(rows)
            return
        self._live = rows if self._live is None else self._live[rows]
        if 2 * len(rows) <= self._num_rows:
            self._drop_dead_rows()

    def _drop_dead_rows(self) -> None:
        if self._live is not None:
            super().keep_rows(self._live)
            self._live = self._static = None

    def keep_columns(self, columns: Int[Tensor, "rows kept"]) -> None:
        if self._live is not None:
            every = torch.arange(columns.shape[1], device=columns.device).repeat(self._num_rows, 1)
            every[self._live] = columns
            columns = every
        super().keep_columns(columns)


class StaticForward:
    """Inputs at fixed addresses, and the forwards that read them. Good for as long as the cache keeps its rows and its room."""

    def __init__(self, model: nn.Module, cache):
        self.model, self.layers, self.cache = model, cache.layers, cache
        self.num_rows, self.num_columns = cache.layers[0].keys.shape[0], cache.layers[0].room
        device = cache.layers[0].keys.device
        self._start = torch.zeros((), dtype=torch.long, device=device)
        self._columns = torch.arange(self.num_columns, device=device)
        self._is_text = torch.ones(self.num_rows, self.num_columns, dtype=torch.bool, device=device)
        self._ids = torch.zeros(self.num_rows, MAX_TOKENS, dtype=torch.long, device=device)
        self._position_ids = torch.zeros_like(self._ids)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._num_read: Counter[int] = Counter()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def read(
        self,
        token_ids: Int[Tensor, "live new"],
        attention_mask: Int[Tensor, "live columns"],
        position_ids: Int[Tensor, "live new"],
        width: int,
        live: Int[Tensor, "live"] | None,
    ) -> Tensor:
        """The logits of all rows, live or dead, behind `width` tokens, of which those beyond the new ones mean nothing. They last until the next
        call."""
        num_new, num_columns = token_ids.shape[1], attention_mask.shape[1]
        rows = slice(None) if live is None else live
        self._start.fill_(num_columns - num_new)
        self._ids[rows, :num_new] = token_ids
        self._position_ids[rows, :num_new] = position_ids
        self._is_text[rows, :num_columns] = attention_mask.bool()
        self._num_read[width] += 1
        if width not in self._graphs:
            is_tried = self._pool is not None and self.model not in _UNCAPTURABLE and self._num_read[width] > NUM_PLAIN
            if not (is_tried and self._captured(width)):
                return self._forward(width)
        graph, logits = self._graphs[width]
        graph.replay()
        return logits

    def _forward(self, width: int) -> Tensor:
        """Of the tokens in place. Columns behind the new ones are seen by none of these."""
        columns = self._start + self._columns[:width]
        is_seen = self._is_text[:, None, None, :] & (self._columns <= columns[:, None])
        for layer in self.layers:
            layer.columns = columns
        output = self.model(
            input_ids=self._ids[:, :width],
            attention_mask=is_seen,
            position_ids=self._position_ids[:, :width],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=width,
        )
        for layer in self.layers:
            layer.columns = None
        return output.logits

    def _captured(self, width: int) -> bool:
        """Capture the forward of this width. A model that waits for the device within its forward cannot be captured, and is read plainly."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(width)  # what is made on first use is made now
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                logits = self._forward(width)
        except RuntimeError as error:
            _UNCAPTURABLE.add(self.model)
            warnings.warn(
                f"No CUDA graph can be made of the forward of {type(self.model).__name__} ({str(error).splitlines()[0]}). Guided rollouts take "
                "longer without, but are the same.",
                stacklevel=2,
            )
            return False
        self._graphs[width] = graph, logits
        return True
