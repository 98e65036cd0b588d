"""The policy in a vLLM engine of this process, or behind `vllm serve`: texts go in, and come back with the tokens up to the next head of the coin.

Many requests are in flight. What was written before is in the engine's prefix cache when a row goes on.
"""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from packaging.version import Version

from trl_selective.engines.coin import Coin
from trl_selective.experts.daemon_pool import DaemonPool
from trl_selective.experts.endpoint import endpoint_client, failure_reason

CLASS = "trl_selective.engines.processor:CoinLogitsProcessor"
# Minor versions of vLLM whose interfaces were read. 0.31.0 was run, on a CPU.
OLDEST, NEWEST = Version("0.22"), Version("0.31")
EXPECTED = f"Expected `vllm serve` with `--logits-processors {CLASS}`."
NUM_PROBES = 8
CONCURRENCY = 256  # requests to a server at once
MOMENT = 0.01  # seconds for a look at what has come back

Answer = tuple[int, list[int]]  # row, token ids


@dataclass(frozen=True, eq=False)
class Request:
    """How a row of the policy is to go on.

    Attributes:
        row: whose answer it will be.
        text: token ids so far.
        max_tokens: to be drawn at most, at least 1.
        seed: of the engine's draws.
        coin_seed: of the row.
    """

    row: int
    text: Sequence[int]
    max_tokens: int
    seed: int
    coin_seed: int


@runtime_checkable
class Engine(Protocol):
    """Where the policy draws.

    Attributes:
        max_model_len: tokens that a text may have.
        is_busy: whether requests are in flight.
    """

    max_model_len: int

    @property
    def is_busy(self) -> bool: ...

    def submit(self, request: Request, coin: Coin, temperature: float, stop_token_ids: Collection[int]) -> None:
        """Let the policy write on, from its full law at this temperature, up to and including one of these tokens."""

    def poll(self, patient: bool) -> Iterator[Answer]:
        """What has come back; `patient` if there is nothing else to do than to wait for it."""

    def abort(self) -> None:
        """Forget what is in flight."""


def check_version() -> None:
    """Refuse a vLLM in this process whose interface for logits processors nobody here has seen.

    Raises:
        ImportError: naming the versions.
    """
    import vllm

    if not OLDEST <= Version(".".join(vllm.__version__.split(".")[:2])) <= NEWEST:
        raise ImportError(
            f"Guided rollouts with vLLM need vllm >= {OLDEST} and <= {NEWEST}.*, got {vllm.__version__}. Install one of these, or set "
            "use_vllm=False."
        )


def check_flips(engine: Engine, coin: Coin) -> None:
    """Make sure that the engine flips coins: some that show heads for certain all come back as such. A plain engine draws the sentinel by chance.

    Raises:
        ValueError: if it does not.
    """
    certain = replace(coin, weighting="constant", threshold=0.0, max_weight=1.0)
    drawn: list[int] = []
    try:
        for row in range(NUM_PROBES):
            engine.submit(Request(row, [0], 1, seed=row, coin_seed=row), certain, 1.0, [coin.sentinel])
        while engine.is_busy:
            drawn += [token for _, ids in engine.poll(patient=True) for token in ids]
    finally:
        engine.abort()
    if drawn != [coin.sentinel] * NUM_PROBES:
        raise ValueError(
            f"The vLLM engine of the policy does not guide: it drew {drawn} where it had to draw {coin.sentinel}. Start it with "
            f"`--logits-processors {CLASS}`."
        )


class LocalEngine:
    """An engine of vLLM in this process (`vllm.LLM`), whose steps are taken here."""

    def __init__(self, llm: Any):
        self._engine, self._number = llm.llm_engine, 0
        self._rows: dict[str, int] = {}  # by request
        self.max_model_len: int = self._engine.model_config.max_model_len

    @property
    def is_busy(self) -> bool:
        return bool(self._rows)

    def submit(self, request: Request, coin: Coin, temperature: float, stop_token_ids: Collection[int]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=temperature,
            max_tokens=request.max_tokens,
            seed=request.seed,
            stop_token_ids=sorted(stop_token_ids),
            ignore_eos=True,  # which ends are ends is said here
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=coin.arguments(request.coin_seed),
        )
        name, self._number = f"guided-{self._number}", self._number + 1
        self._rows[name] = request.row
        self._engine.add_request(name, {"prompt_token_ids": list(request.text)}, params)

    def poll(self, patient: bool) -> Iterator[Answer]:
        for output in self._engine.step() if self._rows else ():
            if output.finished and output.request_id in self._rows:
                yield self._rows.pop(output.request_id), list(output.outputs[0].token_ids)

    def abort(self) -> None:
        self._engine.abort_request(list(self._rows))
        self._rows.clear()


class ServedEngine:
    """The policy behind `vllm serve`. A request that fails ends training: a server that comes back has lost the weights that were sent to it.

    Args:
        url: of the server, such as "http://localhost:8000".

    Raises:
        ImportError: if the package `openai` is missing.
        RuntimeError: if the server does not answer.
    """

    def __init__(self, url: str):
        self.url = url
        # TRL sends weights there without a key: none can be asked for, and that of another endpoint is none of its business.
        self._client = endpoint_client(f"{url.rstrip('/')}/v1", timeout=3600.0, max_retries=2, sends_key=False)
        self._pool = DaemonPool(CONCURRENCY, "policy-server")
        self._flight: dict[Future, int] = {}
        served = self._ask(self._client.models.list).data
        self._model: str = served[0].id if served else ""
        self.max_model_len: int = getattr(served[0], "max_model_len", 0) if served else 0
        if not self.max_model_len:
            raise RuntimeError(f"{url} serves no policy as `vllm serve` does. {EXPECTED}")

    @property
    def is_busy(self) -> bool:
        return bool(self._flight)

    def submit(self, request: Request, coin: Coin, temperature: float, stop_token_ids: Collection[int]) -> None:
        body = {
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": sorted(stop_token_ids),
            "ignore_eos": True,
            "skip_special_tokens": False,
            "add_special_tokens": False,
            "return_token_ids": True,
            "vllm_xargs": coin.arguments(request.coin_seed),
        }
        future = self._pool.submit(
            self._client.completions.create,
            model=self._model,
            prompt=list(request.text),
            max_tokens=request.max_tokens,
            seed=request.seed,
            temperature=temperature,
            top_p=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            extra_body=body,
        )
        self._flight[future] = request.row

    def poll(self, patient: bool) -> Iterator[Answer]:
        done = wait(self._flight, None if patient else MOMENT, FIRST_COMPLETED).done
        for future in done:
            (choice,) = self._ask(future.result).choices
            yield self._flight.pop(future), getattr(choice, "token_ids", None) or []

    def abort(self) -> None:
        for future in self._flight:
            future.cancel()
        self._flight.clear()

    def _ask(self, question: Any) -> Any:
        from openai import OpenAIError

        try:
            return question()
        except OpenAIError as error:
            reason = failure_reason(error, self._client, "vllm_server_base_url")
        raise RuntimeError(f"The policy's server at {self.url} does not answer as it should: {reason} {EXPECTED}")
