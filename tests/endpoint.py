"""A small server that speaks OpenAI's protocol: a real model answers, or canned text, and it can be told to fail."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training import EXPERT
from trl_selective.sampling.unguided import encode_prompt, end_token_ids, sample_completions

Reply = tuple[int, dict[str, str], str]  # status, headers, body


class ExpertAnswers:
    """The quickstart's expert, as a server that keeps seeds would let it answer."""

    def __init__(self):
        self.model = AutoModelForCausalLM.from_pretrained(EXPERT)
        self.tokenizer = AutoTokenizer.from_pretrained(EXPERT)
        self.ends = end_token_ids(self.model, self.tokenizer)

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

    def __init__(self, answer: Callable, trouble: Callable[..., Reply | None] = lambda number, headers: None):
        self.answer, self.trouble = answer, trouble
        self.requests: list[tuple[str, dict]] = []
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, headers, text = endpoint.reply(self.path, body, self.headers)
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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
