"""What vLLM loads: `--logits-processors trl_selective.engines.processor:CoinLogitsProcessor`, or the class in `LLM(logits_processors=[...])`.

It is never registered as an entry point, which every engine on the machine would load. One class for both interfaces of vLLM: a runner of the
first generation (up to 0.30, and later ones with VLLM_USE_V2_MODEL_RUNNER=0) hands it the rows of the batch, one of the second the slots of
its requests. Requests without a coin pass untouched.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor as FirstGeneration
from vllm.v1.sample.logits_processor import process_dict_updates

from trl_selective.engines.coin import Coin

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondGeneration
except ImportError:  # vLLM < 0.31
    SecondGeneration = object


class Guided(NamedTuple):
    """A guided request: its coin, the seed of its row, its temperature, and its text so far, as far as that is known here."""

    coin: Coin
    seed: int
    temperature: float
    text: tuple[list[int], ...] = ()


class CoinLogitsProcessor(FirstGeneration, SecondGeneration):
    """Flips the coins of the requests that carry one (`Coin.arguments`)."""

    def __init__(self, vllm_config: Any, *state: Any):
        self._guided: dict[int, Guided] = {}  # by row of the batch, or by slot

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request that carries half a coin, or one at temperature 0.

        Raises:
            ValueError: naming what is wrong.
        """
        if Coin.from_arguments(sampling_params.extra_args) and sampling_params.temperature <= 0:
            raise ValueError(f"A guided request needs temperature > 0, got {sampling_params.temperature}.")

    @staticmethod
    def _read(params: SamplingParams, *text: list[int]) -> Guided | None:
        carried = Coin.from_arguments(params.extra_args)
        return Guided(*carried, params.temperature, text) if carried else None

    # ---- First generation --------------------------------------------------------------------------------------------------------------

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._guided, batch_update, self._read)  # prompt and output; the latter grows

    # ---- Second generation -------------------------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        guided = self._read(sampling_params)
        self._guided.pop(req_idx, None)  # the last request of this slot
        if guided is not None:
            self._guided[req_idx] = guided
        return guided is not None

    # ---- Both --------------------------------------------------------------------------------------------------------------------------

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        members = defaultdict(list)
        for row, guided, position in self._rows(ctx):
            members[guided.coin, guided.temperature].append((row, guided.seed, position))
        for (coin, temperature), numbers in members.items():  # one, unless several runs share a server
            rows, seeds, positions = torch.tensor(numbers, device=logits.device).unbind(1)
            logits[rows] = coin.flip(logits[rows], temperature, seeds, positions)
        return logits

    def _rows(self, ctx: Any) -> Iterator[tuple[int, Guided, int]]:
        """The rows of guided requests, with the text position of the token that each is about to draw."""
        if ctx is None:
            for row, guided in self._guided.items():
                yield row, guided, sum(map(len, guided.text))
        elif not self._guided.keys().isdisjoint(ctx.idx_mapping_np.tolist()):
            slots, read = ctx.expanded_idx_mapping.tolist(), ctx.pos.tolist()
            for row, slot in enumerate(slots):
                if slot in self._guided:
                    yield row, self._guided[slot], read[row] + 1
