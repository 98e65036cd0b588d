"""A small server that speaks OpenAI's protocol: a real model answers, or canned text, and it can be told to fail."""

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training import EXPERT
from trl_selective.sampling.draw import inverse_cdf
from trl_selective.sampling.unguided import encode_prompt, end_token_ids, sample_completions

Reply = tuple[int, dict[str, str], str]  # status, headers, body


class ExpertAnswers:
    """The quickstart's expert, as a server that keeps seeds would let it answer."""

    def __init__(self):
        self.model = AutoModelForCausalLM.from_pretrained(EXPERT)
        self.tokenizer = AutoTokenizer.from_pretrained(EXPERT)
        self.ends = end_token_ids(self.model.generation_config, self.tokenizer)

    def __call__(self, prompt: str, seed: int, length: int, temperature: float) -> tuple[str, str]:
        """An answer, and why it ended."""
        generator = torch.Generator().manual_seed(seed)
        (token_ids,) = sample_completions(
            self.model,
            [encode_prompt(self.tokenizer, prompt)],
            max_completion_length=length,
            eos_token_ids=self.ends,
            pad_token_id=0,
            temperature=temperature,
            uniforms=torch.rand(1, length, dtype=torch.float64, generator=generator),
        )
        reason = "stop" if token_ids[-1] in self.ends else "length"
        return self.tokenizer.decode(token_ids, skip_special_tokens=True), reason


class Endpoint:
    """A server on this machine, while the context lasts.

    Args:
        answer: the text that follows a prompt, and the reason why it ended.
        trouble: what to reply instead to a request, by its number and headers; None to answer it.

    Attributes:
        requests: path and body of each, in order.
    """

    def __init__(
        self, answer: Callable, trouble: Callable[..., Reply | None] = lambda number, headers: None, port: int = 0
    ):
        self.answer, self.trouble = answer, trouble
        self.requests: list[tuple[str, dict]] = []
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.do_POST()

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
                status, headers, text = endpoint.reply(self.path, body, self.headers)
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def handle(self):
                with suppress(ConnectionError):  # of a client that would not wait
                    super().handle()

            def log_message(self, *arguments):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

        self.server = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def reply(self, path: str, body: dict, headers) -> Reply:
        with self.lock:
            number = len(self.requests)
            self.requests.append((path, body))
        if (trouble := self.trouble(number, headers)) is not None:
            return trouble
        is_chat = path == "/v1/chat/completions"
        prompt = body["messages"][-1]["content"] if is_chat else body["prompt"]
        length = body["max_completion_tokens" if is_chat else "max_tokens"]
        text, reason = self.answer(prompt, body["seed"], length, body["temperature"])
        said = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        return 200, {}, json.dumps({"choices": [{"index": 0, "finish_reason": reason, **said}]})

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


class VllmEndpoint(Endpoint):
    """A server that answers in token ids, in the words of `vllm serve` (seen on 0.31), from a model's own law.

    Args:
        model: what is served, as "the-expert".
        encode: token ids of a text.
        longest: tokens that a text may have.
        trouble, port: as for `Endpoint`.
    """

    name = "the-expert"

    def __init__(self, model, encode: Callable[[str], list[int]], longest: int = 64, **kwargs):
        super().__init__(answer=lambda: None, **kwargs)
        self.model, self.encode, self.longest = model, encode, longest
        self.logits = lru_cache(4096)(self._logits)

    @torch.no_grad()
    def _logits(self, text: tuple[int, ...]) -> torch.Tensor:
        with self.lock:
            return self.model(input_ids=torch.tensor([text]), use_cache=False).logits[0].double()

    def reply(self, path: str, body: dict, headers) -> Reply:
        with self.lock:
            number = len(self.requests)
            self.requests.append((path, body))
        if (trouble := self.trouble(number, headers)) is not None:
            return trouble
        if path == "/v1/models":
            return 200, {}, json.dumps({"data": [{"id": self.name, "max_model_len": self.longest}]})
        text = body["prompt"] if isinstance(body["prompt"], list) else self.encode(body["prompt"])
        if len(text) + body["max_tokens"] > self.longest:
            return 400, {}, json.dumps({"error": {"message": f"maximum context length is {self.longest} tokens"}})
        if max([*text, *map(int, body.get("logit_bias", ()))]) >= self.model.config.vocab_size:
            return 400, {}, json.dumps({"error": {"message": "out-of-vocab token ids"}})
        tokens, logps, reason = self._echo(text) if body.get("echo") else self._draw(text, body)
        logprobs = {"tokens": [f"token_id:{token}" for token in tokens], "token_logprobs": logps}
        choice = {"index": 0, "text": "", "finish_reason": reason, "logprobs": logprobs}
        return 200, {}, json.dumps({"choices": [choice]})

    def _echo(self, text: list[int]):
        logps = self.logits(tuple(text)).log_softmax(-1)[:-1].gather(-1, torch.tensor(text[1:])[:, None])
        return text, [None, *logps[:, 0].tolist()], "length"

    def _draw(self, text: list[int], body: dict):
        assert body["max_tokens"] == 1
        logits = self.logits(tuple(text))[-1]
        uniform = torch.rand(1, dtype=torch.float64, generator=torch.Generator().manual_seed(body["seed"]))
        token = int(inverse_cdf((logits / body["temperature"]).softmax(-1)[None], uniform))
        ends = self.model.generation_config.eos_token_id
        is_end = token in (ends if isinstance(ends, list) else [ends])
        return [token], [max(logits.log_softmax(-1)[token].item(), -9999.0)], "stop" if is_end else "length"
