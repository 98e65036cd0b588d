"""Stands in for vLLM where that is not installed: it steps a model of transformers, and flips coins with the same lines."""

import torch

from trl_selective.engines.coin import Coin
from trl_selective.engines.engine import Request


class TransformersEngine:
    """Requests that take their steps together, each for itself.

    Attributes:
        requests: all that were made.
        num_steps: that were taken.
    """

    def __init__(self, model, max_model_len: int = 64):
        self.model, self.max_model_len = model, max_model_len
        self.requests: list[Request] = []
        self.num_steps = 0
        self.abort()

    @property
    def is_busy(self) -> bool:
        return bool(self.flight)

    def submit(self, request: Request, coin: Coin, temperature: float, stop_token_ids) -> None:
        assert 1 <= request.max_tokens <= self.max_model_len - len(request.text)
        self.requests.append(request)
        self.flight[request] = [], coin, temperature, set(stop_token_ids), torch.Generator().manual_seed(request.seed)

    @torch.no_grad()
    def poll(self, patient: bool):
        self.num_steps += self.is_busy
        for request, (ids, coin, temperature, stops, generator) in list(self.flight.items()):
            text = [*request.text, *ids]
            logits = self.model(input_ids=torch.tensor([text]), use_cache=False).logits[:, -1]
            seed, position = torch.tensor([request.coin_seed]), torch.tensor([len(text)])
            law = (coin.flip(logits, temperature, seed, position)[0] / temperature).softmax(-1)
            ids.append(int(torch.multinomial(law, 1, generator=generator)))
            if ids[-1] in stops or len(ids) == request.max_tokens:
                del self.flight[request]
                yield request.row, ids

    def abort(self) -> None:
        self.flight: dict[Request, tuple] = {}
