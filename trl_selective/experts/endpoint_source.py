"""Whole completions of an expert behind an endpoint that speaks OpenAI's protocol, such as that of vLLM. Of its log-probabilities none are
kept: its tokenizer is not the policy's, as a rule.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trl_selective.experts.daemon_pool import DaemonPool
from trl_selective.experts.endpoint import failure_reason
from trl_selective.experts.patient_endpoint import ExpertServerError
from trl_selective.experts.sources import Completion, Sampling
from trl_selective.grading import Conversation


@dataclass
class EndpointSource:
    """A model behind an endpoint. Texts are completed, conversations answered; what the server adds to the temperature is its own affair.

    Thoughts count only where the server leaves them in the answer: start it without a parser that takes them out.

    Args:
        client: as `endpoint_client` returns it.
        name: of the model, there and in the dataset.
        sampling: how it draws; seeds are sent along, and kept as far as the server keeps them.
        concurrency: requests at once.
        chat_template_kwargs: further arguments of the server's chat template, for conversations, sent along as vLLM and SGLang take them.
    """

    client: Any
    name: str
    sampling: Sampling
    concurrency: int = 16
    chat_template_kwargs: Mapping[str, Any] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        template = {"chat_template_kwargs": dict(self.chat_template_kwargs or {})}
        return {"expert": self.name, **asdict(self.sampling), **template}

    def complete(self, prompts: Sequence[str | Conversation], first: int) -> Iterator[list[Completion]]:
        """The completions of each prompt from index `first` on, in order.

        Raises:
            ExpertServerError: if a request fails for good. Completions of rows before it were all handed out.
        """
        pool = DaemonPool(self.concurrency, "expert-endpoint")
        pending: deque = (
            deque()
        )  # futures of one row each; so many rows that the pool is busy while the first of them is slow
        try:
            for row in range(first, len(prompts)):
                asked = range(self.sampling.num_completions)
                pending.append([pool.submit(self._ask, prompts[row], row, number) for number in asked])
                if len(pending) == self.concurrency:
                    yield [future.result() for future in pending.popleft()]
            while pending:
                yield [future.result() for future in pending.popleft()]
        finally:  # what is being answered is left to itself
            for future in (future for row in pending for future in row):
                future.cancel()

    def _ask(self, prompt: str | Conversation, row: int, number: int) -> Completion:
        from openai import OpenAIError

        try:
            response = self._request(prompt, self.sampling.seed_of(row, number))
        except OpenAIError as error:
            raise self._failure(row, failure_reason(error, self.client, "base_url")) from None
        if not getattr(response, "choices", None):
            raise self._failure(
                row, "the answer has no `choices`. Does base_url end as the server wants it, often in /v1?"
            )
        choice = response.choices[0]
        text = (choice.text if isinstance(prompt, str) else choice.message.content) or ""
        return Completion(text, is_whole=choice.finish_reason == "stop" and bool(text.strip()))

    def _request(self, prompt: Any, seed: int) -> Any:
        settings: dict[str, Any] = {"model": self.name, "temperature": self.sampling.temperature, "seed": seed}
        length = self.sampling.max_completion_length
        if isinstance(prompt, str):
            return self.client.completions.create(prompt=prompt, max_tokens=length, **settings)
        if self.chat_template_kwargs:
            settings["extra_body"] = {"chat_template_kwargs": dict(self.chat_template_kwargs)}
        return self.client.chat.completions.create(messages=prompt, max_completion_tokens=length, **settings)

    def _failure(self, row: int, reason: str) -> ExpertServerError:
        return ExpertServerError(
            f"Row {row} got no completion from {self.name!r} (max_retries={self.client.max_retries}): {reason} Rows before it are kept: start "
            "again with the same settings to go on from there."
        )
