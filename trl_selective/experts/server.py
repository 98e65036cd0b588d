"""An expert behind an OpenAI-compatible completions endpoint that guides token by token: stock `vllm serve`, in another process or on another machine.

A coin of weight w decides who draws a token (`sampling/remote.py`), so that the expert has to draw single tokens, and only where the coin shows
heads. It is asked in token ids and answers in token ids: "token_id:123" is how vLLM spells token 123 (`return_tokens_as_token_ids`). Each request
says in full how to draw, since a server takes what it is not told from the model's own generation config. Its seed comes from the policy's noise:
with a server that keeps seeds, a run that is resumed draws the same again.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl_selective.experts.local import check_vocabulary
from trl_selective.experts.patient_endpoint import ExpertServerError, PatientEndpoint

FULL_LAW = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
OF_VLLM = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "return_tokens_as_token_ids": True}
ID_PREFIX = "token_id:"

NUM_PROBED = 32  # tokens of the text that shows whether policy and server have one vocabulary


class ExpertServer:
    """An expert that draws the next token of given texts, and says how likely given tokens are. `connect_expert` checks that it can.

    Args:
        url: of the endpoint, such as "http://localhost:8000/v1".
        name: under which it serves the expert.
        vocab_size: ids from here on are no tokens of the policy.
        eos_token_ids: tokens that end a completion of the policy.
        patience: seconds for which a request is repeated while its failures may pass.
        scores: whether samplers shall ask for the probability of every token.
        concurrency: requests at once.

    Raises:
        ImportError: if the package `openai` is missing.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        vocab_size: int,
        eos_token_ids: Collection[int],
        patience: float = 600.0,
        scores: bool = False,
        concurrency: int = 64,
    ):
        self.url, self.name, self.scores = url, name, scores
        self.vocab_size, self.eos_token_ids = vocab_size, frozenset(eos_token_ids)
        self.endpoint = PatientEndpoint(url, f"The expert {name!r}", patience=patience, concurrency=concurrency)

    def draw(self, texts: Sequence[Sequence[int]], seeds: Sequence[int], temperature: float) -> list[int]:
        """The next token of each text, drawn from the expert's full distribution at `temperature`.

        Raises:
            ExpertServerError: if a request fails for good, or if the token is none of the policy's.
        """
        return self.endpoint.ask_all(
            [partial(self._draw, list(text), seed, temperature) for text, seed in zip(texts, seeds, strict=True)]
        )

    def completion_logps(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[Float[Tensor, "seq"]]:
        """log pi*(token | prompt, tokens before it) of every completion token at temperature 1, the only one that servers give it at.

        Raises:
            ExpertServerError: if a request fails for good.
        """
        pairs = zip(prompt_ids, completion_ids, strict=True)
        return self.endpoint.ask_all(
            [partial(self._score, list(prompt), list(completion)) for prompt, completion in pairs]
        )

    # ---- Requests ----------------------------------------------------------------------------------------------------------------------

    def _draw(self, text: list[int], seed: int, temperature: float, timeout: float, **settings) -> int:
        choice = self._complete(text, timeout, max_tokens=1, seed=seed, temperature=temperature, **settings)
        (token,) = _token_ids(choice)
        if not 0 <= token < self.vocab_size:
            raise ExpertServerError(
                f"The expert server at {self.url} drew token {token}, but the policy's end at {self.vocab_size - 1}. Serve an expert with the "
                "policy's vocabulary, or one that was trained never to draw the padding behind it."
            )
        if choice.finish_reason == "stop" and token not in self.eos_token_ids:
            raise ExpertServerError(
                f"The expert server at {self.url} ends its answers with token {token}, but the policy ends with {sorted(self.eos_token_ids)} "
                "only, so that rollouts would run on behind the expert's end. Give the policy a tokenizer with this `eos_token`, or add it to "
                "its `generation_config.eos_token_id`."
            )
        self.endpoint.is_known = True
        return token

    def _score(self, prompt: list[int], completion: list[int], timeout: float) -> Tensor:
        text = prompt + completion
        choice = self._complete(text, timeout, max_tokens=0, echo=True)
        if _token_ids(choice) != text:
            raise ValueError("the text that it scored is another one than it was asked for")
        return torch.tensor(choice.logprobs.token_logprobs[len(prompt) :], dtype=torch.float32)

    def _tokenize(self, text: str, timeout: float) -> list[int]:
        return _token_ids(self._complete(text, timeout, max_tokens=0, echo=True))

    def _complete(self, prompt: str | list[int], timeout: float, *, temperature: float = 1.0, **settings) -> Any:
        response = self.endpoint.client.completions.create(
            model=self.name,
            prompt=prompt,
            logprobs=0,  # of the tokens alone
            temperature=temperature,
            timeout=timeout,
            extra_body={**OF_VLLM, "add_special_tokens": False},
            **FULL_LAW,
            **settings,
        )
        return response.choices[0]

    # ---- Checks ------------------------------------------------------------------------------------------------------------------------

    def check(self, tokenizer: PreTrainedTokenizerBase, max_completion_length: int, temperature: float) -> None:
        """Make sure that the server serves this expert, for texts that are long enough, at this temperature, and that both mean the same by a
        token id.

        Raises:
            ExpertServerError: if not.
        """
        (served,) = self.endpoint.ask_all(
            [lambda timeout: list(self.endpoint.client.models.list(timeout=timeout).data)]
        )
        model = {each.id: each for each in served}.get(self.name)
        if model is None:
            raise ExpertServerError(
                f"{self.url} serves {[each.id for each in served]}, but not {self.name!r}. Set expert_model_name_or_path to a name that it serves."
            )
        longest = getattr(model, "max_model_len", None)
        if longest is not None and longest <= max_completion_length + self.scores:  # which takes one token more
            raise ExpertServerError(
                f"{self.url} takes texts of {longest} tokens, but completions alone may have max_completion_length={max_completion_length}. "
                "Start it with a larger `--max-model-len`: the longest prompt and completion, and one token more."
            )
        text = _probe(tokenizer, self.vocab_size)
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        (theirs,) = self.endpoint.ask_all([partial(self._tokenize, text)])
        if ours != theirs:
            raise ExpertServerError(
                f"The expert behind {self.url} reads {text!r} as the tokens {theirs}, but the policy's tokenizer reads it as {ours}. Token-level "
                "guidance needs one vocabulary: serve an expert of the policy's model family."
            )
        last = {str(self.vocab_size - 1): 0.0}  # a bias that changes nothing, but for a token that must be there
        self.endpoint.ask_all([partial(self._draw, ours, 0, temperature, logit_bias=last)])
        read_too = max(tokenizer.get_vocab().values())  # which the policy alone draws
        if read_too >= self.vocab_size and read_too != tokenizer.pad_token_id:
            self.endpoint.ask_all([partial(self._draw, [*ours, read_too], 0, temperature)])


def connect_expert(
    url: str,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    expert_tokenizer: PreTrainedTokenizerBase | None,
    max_completion_length: int,
    temperature: float,
    **settings,
) -> ExpertServer:
    """The expert behind `url`, once it is sure that it can guide.

    Args:
        url, name: as for `ExpertServer`.
        tokenizer: the policy's.
        expert_tokenizer: the expert's, to be compared token by token; None leaves it at a probe.
        max_completion_length: tokens of a completion.
        temperature: that it will draw at.
        settings: further ones of `ExpertServer`.

    Raises:
        ValueError: if the tokenizers differ.
        ExpertServerError: if the server cannot guide.
    """
    server = ExpertServer(url, name, vocab_size=check_vocabulary(expert_tokenizer, tokenizer), **settings)
    server.check(tokenizer, max_completion_length, temperature)
    return server


def _token_ids(choice: Any) -> list[int]:
    """The ids of the tokens in an answer."""
    tokens = choice.logprobs.tokens
    if not tokens or not all(token.startswith(ID_PREFIX) for token in tokens):
        raise ValueError(f"expected tokens like '{ID_PREFIX}123', got {tokens}")
    return [int(token.removeprefix(ID_PREFIX)) for token in tokens]


def _probe(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
    """A text with tokens from the whole vocabulary."""
    ids = torch.linspace(0, vocab_size - 1, NUM_PROBED).long().tolist()
    return tokenizer.decode([token for token in ids if token not in tokenizer.all_special_ids])
