"""Questions to a server that may be down for a while: asked at once, again while their failures may pass, and never for longer than patience lasts.

The library's own retries are counted, and do not know how long that takes.
"""

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from threading import Event
from typing import Any

from trl_selective.experts.daemon_pool import DaemonPool
from trl_selective.experts.endpoint import endpoint_client, failure_reason

REQUEST_TIMEOUT, LAST_TIMEOUT = 60.0, 0.1  # seconds for an answer; and just before patience ends
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between tries
MAY_PASS = (408, 409, 429)  # of the HTTP statuses below 500
WAYS_OUT = {
    400: "If the text is too long for it, start it with a larger `--max-model-len`: the longest prompt and completion, and one token more. If it does "
    "not know a token, serve an expert that has embeddings for all tokens of the policy.",
    401: "Put its key into the environment variable OPENAI_API_KEY.",
    403: "Put its key into the environment variable OPENAI_API_KEY.",
    404: "Expected an endpoint for completions, as `vllm serve` has one (one for chats alone will not do); its address often ends in /v1.",
}


class ExpertServerError(RuntimeError):
    """The expert server cannot be asked, or not be understood."""


class PatientEndpoint:
    """A client for the expert server, and the patience to wait for it.

    Args:
        url: of the endpoint.
        who: whom it serves, for messages.
        patience: seconds for which a question is repeated while its failures may pass.
        concurrency: questions at once.

    Attributes:
        client: of the library `openai`.
        is_known: whether it has given a good answer before; to be set by the caller.
    """

    def __init__(self, url: str, who: str, *, patience: float, concurrency: int):
        self.url, self.who, self.patience = url, who, patience
        self.client = endpoint_client(url, timeout=REQUEST_TIMEOUT, max_retries=0)
        self.is_known = False
        self._pool = DaemonPool(concurrency, "expert-server")
        self._jitter = random.Random()  # its own: the global one belongs to training

    def ask_all(self, questions: Sequence[Callable[[float], Any]]) -> list:
        """The answers to all questions, asked at once. The first that fails for good ends the others.

        Args:
            questions: functions of the seconds that they may take.

        Raises:
            ExpertServerError: naming the url, the last failure, and the way out.
        """
        stopped = Event()
        futures = [self._pool.submit(self._ask, question, stopped) for question in questions]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            return [future.result() for future in futures]
        finally:
            stopped.set()
            for future in futures:
                future.cancel()

    def _ask(self, question: Callable[[float], Any], stopped: Event) -> Any:
        """The answer to a question, which takes the seconds that it may last, and is asked again while patience lasts."""
        from openai import OpenAIError

        deadline, pause = time.monotonic() + self.patience, FIRST_PAUSE
        while True:
            try:
                return question(min(REQUEST_TIMEOUT, max(deadline - time.monotonic(), LAST_TIMEOUT)))
            except (OpenAIError, ValueError, TypeError, AttributeError, IndexError) as failure:
                error: Exception = failure  # which the library did not expect, if it is none of its own
            rest = min(pause * self._jitter.uniform(0.5, 1), deadline - LAST_TIMEOUT - time.monotonic())
            if rest <= 0 or not self._may_pass(error) or stopped.wait(rest):
                raise self._failure(error) from None
            pause = min(2 * pause, LONGEST_PAUSE)

    def _may_pass(self, error: Exception) -> bool:
        """Whether it may help to ask again: after a timeout, a status of 500 or more, or one of `MAY_PASS`; once the server has given a good answer,
        after other failures without a status, too. Before, these mean that the address is wrong."""
        from openai import APIStatusError, APITimeoutError

        if isinstance(error, APIStatusError):
            return error.status_code >= 500 or error.status_code in MAY_PASS
        return self.is_known or isinstance(error, APITimeoutError)

    def _failure(self, error: Exception) -> ExpertServerError:
        from openai import OpenAIError

        if isinstance(error, OpenAIError):
            reason = failure_reason(error, self.client, "expert_model_server_url")
        else:
            reason = f"its answer is not what `vllm serve` answers ({type(error).__name__}: {error})."
        way_out = WAYS_OUT.get(
            getattr(error, "status_code", 0), "Is `vllm serve` running there? Its log may say more."
        )
        if self._may_pass(error):
            way_out = f"This went on for expert_model_server_patience={self.patience:g} seconds. Start the server again, or be more patient."
        return ExpertServerError(f"{self.who} behind {self.url} does not answer as it should: {reason} {way_out}")
