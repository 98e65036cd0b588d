"""On a GPU, a forward of a few tokens is one CUDA graph.

A forward that reads one token for each row spends its time launching small kernels, hundreds of them, on the host. A CUDA graph launches them
all at once, but it is bound to the shapes and addresses with which it was captured. So the cache has room for more columns than there are
(all are attended to, and those without text are masked out), blocks are padded to one of a few widths, and rows that end stay in the cache as dead
weight until half of it is. Logits are those of a plain forward, to rounding.

Graphs are replayed one behind the other, or side by side: small kernels leave most of a GPU idle.
"""

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PretrainedConfig

from trl_selective.sampling.grouped_attention import grouped_attention
from trl_selective.sampling.kv import OPTIONAL_ARGUMENTS, CachedModel, can_forget_tokens, optional_arguments

# To which blocks are padded: a few more tokens take hardly longer, and each width is captured by itself.
WIDTHS = 1, 4, 8, 16, 64
MAX_TOKENS = max(WIDTHS)  # longer blocks are bound by arithmetic
PATIENCE = 16  # blocks read with half of the rows dead before these leave: at the maximum length, the others are about to end too
_UNCAPTURABLE: WeakSet[nn.Module] = WeakSet()
# Of each model what was read plainly before: (name, rows, columns, width).
_WARM: WeakKeyDictionary[nn.Module, set[tuple]] = WeakKeyDictionary()


def cached_model(model: nn.Module, name: str, max_tokens: int) -> CachedModel:
    """The model with a cache (`CachedModel`), and with graphs where it can have them."""
    can_have_graphs = next(model.parameters()).is_cuda and model not in _UNCAPTURABLE and has_static_forward(model)
    return (GraphedModel if can_have_graphs else CachedModel)(model, name, max_tokens)


def has_static_forward(model: nn.Module) -> bool:
    """Whether a forward of a few tokens can be made to depend on nothing but tensors: full attention by PyTorch's kernels, with a mask that
    Transformers' `create_causal_mask` takes as it is, positions that do not depend on the longest row, on one device, with weights that are not
    quantised."""
    base = getattr(model, "get_base_model", lambda: model)()
    module = sys.modules[type(base).__module__]
    return (
        can_forget_tokens(model.config)
        and optional_arguments(model) == OPTIONAL_ARGUMENTS
        and hasattr(module, "create_causal_mask")
        and getattr(model.config, "_attn_implementation", None) == "sdpa"
        and not getattr(model.config, "alibi", False)  # which is made from a mask of two dimensions
        and not rope_types(model.config) & {"dynamic", "longrope"}
        and len(set(getattr(base, "hf_device_map", {}).values())) <= 1
        and not getattr(base, "is_quantized", False)
    )


def rope_types(config: PretrainedConfig) -> set[str | None]:
    """The kinds of rotary embedding in a model's layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    return {each.get("rope_type") for each in [parameters, *by_layer_type]}


class GraphedModel(CachedModel):
    """A `CachedModel` that reads blocks of up to `MAX_TOKENS` tokens by CUDA graphs. On a CPU it does all the same, but for the graphs."""

    def __init__(self, model: nn.Module, name: str, max_tokens: int):
        super().__init__(model, name, max_tokens)
        self._static: StaticForward | None = None

    def read(self, token_ids, attention_mask, position_ids, num_logits):
        return self._begin(token_ids, attention_mask, position_ids, num_logits, is_aside=False)()

    def begin(self, token_ids, attention_mask, position_ids, num_logits):
        return self._begin(token_ids, attention_mask, position_ids, num_logits, is_aside=True)

    def _begin(self, token_ids, attention_mask, position_ids, num_logits, is_aside: bool) -> Callable[[], Tensor]:
        num_new, num_columns = token_ids.shape[1], attention_mask.shape[1]
        if num_new == num_columns or num_new > MAX_TOKENS:
            self._drop_static()
            plain = super().read(token_ids, attention_mask, position_ids, num_logits)
            return lambda: plain
        width = next(width for width in WIDTHS if width >= num_new)
        num_needed = num_columns - num_new + width
        if self._static is None or num_needed > self._static.num_columns or self._static.num_wasted > PATIENCE:
            self._drop_static()
            for layer in self.cache.layers:
                layer.reserve(num_needed)
            arguments = {self._cache_name: self.cache, **self.fixed}
            self._static = StaticForward(self.model, self.cache, self.name, arguments)
        static = self._static
        self.num_prepared += not static.is_ready(width)
        every = static.read(token_ids, attention_mask, position_ids, width, is_aside)

        def logits() -> Tensor:
            if is_aside:
                static.join()
            new = every[:, num_new - num_logits : num_new]
            return new.clone() if static.live is None else new[static.live]  # the next forward writes over them

        return logits

    def keep_rows(self, rows: Int[Tensor, "kept"]) -> None:
        if self._static is None:
            super().keep_rows(rows)
        else:
            self._static.keep_rows(rows)

    def keep_columns(self, columns: Int[Tensor, "rows kept"]) -> None:
        if self._static is not None:
            columns = self._static.with_dead_rows(columns)
            self._static.length = columns.shape[1]
        super().keep_columns(columns)

    def _drop_static(self) -> None:
        """Leave the graphs: cut the cache to its text, and drop the dead rows."""
        if self._static is None:
            return
        for layer in self.cache.layers:
            layer.show(self._static.length)
        if self._static.live is not None:
            super().keep_rows(self._static.live)
        self._static = None


@functools.cache
def stream_of(name: str, device: torch.device, thread: int) -> torch.cuda.Stream:
    """Where graphs of this name are captured and replayed, in this thread: one for good, since cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)


@contextmanager
def going_back_to(stream: torch.cuda.Stream) -> Iterator[None]:
    """Make this the current stream in the end: a capture that fails leaves its own."""
    try:
        yield
    finally:
        torch.cuda.set_stream(stream)


class StaticForward:
    """Inputs at fixed addresses, and the forwards that read them, for as long as the cache keeps its rows and its room.

    Attributes:
        name: of the model, for what there is one of for each name.
        num_rows, num_columns: of the cache.
        length: columns with text.
        live: which rows are; None for all.
        num_wasted: blocks read while half of the rows or more were dead.
    """

    def __init__(self, model: nn.Module, cache, name: str, arguments: dict[str, Any]):
        self.model, self.layers, self.name, self._arguments = model, cache.layers, name, arguments
        states = cache.layers[0].keys
        self.num_rows, self.length, self.num_columns = states.shape[0], states.shape[2], cache.layers[0].room
        self.live: Tensor | None = None
        self.num_wasted = 0
        device = states.device
        self._start = torch.zeros((), dtype=torch.long, device=device)
        self._columns = torch.arange(self.num_columns, device=device)
        self._is_text = torch.ones(self.num_rows, self.num_columns, dtype=torch.bool, device=device)
        self._ids = torch.zeros(self.num_rows, MAX_TOKENS, dtype=torch.long, device=device)
        self._position_ids = torch.zeros_like(self._ids)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._stream = stream_of(name, device, threading.get_ident()) if device.type == "cuda" else None
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def read(
        self,
        token_ids: Int[Tensor, "live new"],
        attention_mask: Int[Tensor, "live columns"],
        position_ids: Int[Tensor, "live new"],
        width: int,
        is_aside: bool,
    ) -> Tensor:
        """The logits of all rows, live or dead, behind `width` tokens, of which those beyond the new ones mean nothing. They last until the next
        call.

        Args:
            is_aside: read beside what the device is told to do next, if there is a graph. The logits are there after `join`, before which
                nothing must touch the cache.
        """
        num_new, num_columns = token_ids.shape[1], attention_mask.shape[1]
        rows = slice(None) if self.live is None else self.live
        self._start.fill_(num_columns - num_new)
        self._ids[rows, :num_new] = token_ids
        self._position_ids[rows, :num_new] = position_ids
        self._is_text[rows, :num_columns] = attention_mask.bool()
        self.length = num_columns
        self.num_wasted += 2 * len(token_ids) <= self.num_rows
        if width in self._graphs:
            graph, logits = self._graphs[width]
            if is_aside and self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
                with torch.cuda.stream(self._stream):
                    graph.replay()
            else:
                graph.replay()
            return logits
        return self._forward(width) if self.is_ready(width) else self._prepare(width)

    def join(self) -> None:
        """Make what is queued next on the device wait for the forward that was begun aside."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def is_ready(self, width: int) -> bool:
        """Whether a read of this width takes no longer than the next one will."""
        return width in self._graphs or self._stream is None or self.model in _UNCAPTURABLE

    def keep_rows(self, rows: Int[Tensor, "kept"]) -> None:
        """The others are dead."""
        self.live = rows if self.live is None else self.live[rows]

    def with_dead_rows(self, columns: Int[Tensor, "live kept"]) -> Int[Tensor, "rows kept"]:
        """Columns to keep of all rows, any for the dead ones."""
        if self.live is None:
            return columns
        every = torch.arange(columns.shape[1], device=columns.device).repeat(self.num_rows, 1)
        every[self.live] = columns
        return every

    def _prepare(self, width: int) -> Tensor:
        """The first time, read plainly, so that what is made on first use is made, by other rollouts as well; then capture that and replay it. A
        model that waits for the device within its forward cannot be captured."""
        stream = self._stream
        assert stream is not None
        current = torch.cuda.current_stream(stream.device)
        stream.wait_stream(current)
        shape = self.name, self.num_rows, self.num_columns, width
        if shape not in (warm := _WARM.setdefault(self.model, set())):
            warm.add(shape)
            with torch.cuda.stream(stream):
                logits = self._forward(width)
            current.wait_stream(stream)
            logits.record_stream(current)
            return logits
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(stream.device),
                going_back_to(current),
                torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
            ):
                logits = self._forward(width)
        except RuntimeError as error:
            for cause in (error, error.__context__):  # the end of a capture that ran out of memory may fail as well
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
            _UNCAPTURABLE.add(self.model)
            warnings.warn(
                f"No CUDA graph can be made of the forward of {type(self.model).__name__} ({str(error).splitlines()[0]}). Guided rollouts take "
                "longer without, but are the same.",
                stacklevel=2,
            )
            return self._forward(width)
        self._graphs[width] = graph, logits
        graph.replay()
        return logits

    def _forward(self, width: int) -> Tensor:
        """Of the tokens in place. Columns behind the new ones are seen by none of these."""
        columns = self._start + self._columns[:width]
        is_seen = self._is_text[:, None, None, :] & (self._columns <= columns[:, None])
        for layer in self.layers:
            layer.columns = columns
        try:
            with grouped_attention():
                output = self.model(
                    input_ids=self._ids[:, :width],
                    attention_mask=is_seen,
                    position_ids=self._position_ids[:, :width],
                    use_cache=True,
                    logits_to_keep=width,
                    **self._arguments,
                )
        finally:
            for layer in self.layers:
                layer.columns = None
        return output.logits
