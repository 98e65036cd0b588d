"""A server is trusted with guidance once it has shown that it can guide; asked with patience, and never for longer; and never led astray."""

import random
import re
import sys
import threading
import time
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.endpoint import VllmEndpoint
from tests.models import tiny_model
from tests.training import EXPERT, POLICY, path_dataset
from trl_selective.experts import ExpertServer, ExpertServerError, completion_logps, connect_expert
from trl_selective.experts.patient_endpoint import FIRST_PAUSE

TEXTS = [[3], [2, 5], [5, 2, 4], [3, 3]]
UNHAPPY = (503, {}, '{"error": {"message": "out of memory"}}')


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=2)


@pytest.fixture
def endpoint(model):
    with VllmEndpoint(model, encode=lambda text: [2]) as endpoint:
        yield endpoint


def connected(endpoint, *, patience=20.0, vocab_size=7, eos=(1,), **settings) -> ExpertServer:
    name = settings.pop("name", "the-expert")
    return ExpertServer(endpoint.url, name, vocab_size=vocab_size, eos_token_ids=eos, patience=patience, **settings)


def draw(expert: ExpertServer, texts=TEXTS):
    return expert.draw(texts, list(range(len(texts))), 1.0)


def test_it_scores_as_the_model_does(endpoint, model):
    prompts, completions = [[3], [2, 5, 4]], [[5, 2, 1], [6]]
    scored = connected(endpoint).completion_logps(prompts, completions)
    for ours, theirs in zip(scored, completion_logps(model, prompts, completions), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_requests_are_few_at_once_and_keep_their_order(endpoint, monkeypatch):
    at_once, most, lock, answer = 0, 0, threading.Lock(), endpoint._draw

    def slower_first(text, body):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.1 / (1 + body["seed"]))
        with lock:
            at_once -= 1
        return answer(text, body)

    expected = draw(connected(endpoint), TEXTS * 3)
    monkeypatch.setattr(endpoint, "_draw", slower_first)
    assert draw(connected(endpoint, concurrency=3), TEXTS * 3) == expected
    assert len(set(expected)) > 1
    assert most == 3


# ---- Trouble ---------------------------------------------------------------------------------------------------------------------------


def test_trouble_that_passes(endpoint):
    expert = connected(endpoint)
    expected = draw(expert)
    endpoint.requests.clear()
    troubles = [UNHAPPY, (429, {}, "{}"), (200, {}, "{"), (200, {}, '{"choices": []}'), (500, {}, "<html>")]
    endpoint.trouble = lambda number, headers: troubles[number] if number < len(troubles) else None
    assert draw(expert) == expected
    assert len(endpoint.requests) == len(TEXTS) + len(troubles)


def slow(number, headers):
    time.sleep(3)
    return UNHAPPY


def token(text: str, reason="length"):
    choice = f'{{"index": 0, "text": "", "finish_reason": "{reason}", "logprobs": {{"tokens": ["{text}"]}}}}'
    return 200, {}, f'{{"choices": [{choice}]}}'


NONSENSE = "its answer is not what `vllm serve` answers"
MOVED = r"It redirects to 'http://elsewhere/v1', which is not followed: if that is right, give it as expert_model_server_url\."
PATIENCE = (
    r" This went on for expert_model_server_patience=0\.8 seconds\. Start the server again, or be more patient\."
)
TROUBLES = {  # a reply, whether it may pass, what is said
    "unhappy": (UNHAPPY, True, "InternalServerError: .*out of memory"),
    "busy": ((429, {}, "{}"), True, "RateLimitError"),
    "slow": (slow, True, r"APITimeoutError: Request timed out\."),
    "malformed": ((200, {}, '{"choices": ['), True, rf"{NONSENSE} \(JSONDecodeError"),
    "a page": ((200, {"Content-Type": "text/html"}, "<html>Welcome</html>"), True, NONSENSE),
    "no choices": ((200, {}, "{}"), True, NONSENSE),
    "no token": ((200, {}, '{"choices": [{"logprobs": {"tokens": []}}]}'), True, NONSENSE),
    "text": (token("Hello"), True, rf"{NONSENSE} .*expected tokens like 'token_id:123', got \['Hello'\]"),
    "chats alone": ((404, {}, "{}"), False, "NotFoundError.*Expected an endpoint for completions, .*one for chats alone will not do"),
    "no key": ((401, {}, "{}"), False, "AuthenticationError: .*environment variable OPENAI_API_KEY"),
    "forbidden": ((403, {}, "{}"), False, "PermissionDeniedError: .*environment variable OPENAI_API_KEY"),
    "too long": ((400, {}, '{"error": {"message": "maximum context length"}}'), False, "BadRequestError: .*maximum context length"),
    "moved": ((307, {"Location": "http://elsewhere/v1"}, "{}"), False, MOVED),
    "padding": (token("token_id:7"), False, r"drew token 7, but the policy's end at 6\. Serve an expert with the policy's vocabulary"),
    "no id": (token("token_id:-1"), False, "drew token -1, but"),
    "a foreign end": (token("token_id:4", "stop"), False, r"ends its answers with token 4, but the policy ends with \[1\] only"),
}  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_that_stays(endpoint, trouble):
    """It is borne for as long as patience lasts if it may pass, and not at all if it may not."""
    reply, may_pass, message = TROUBLES[trouble]
    expert = connected(endpoint, patience=0.8)
    draw(expert)
    endpoint.requests.clear()
    endpoint.trouble = reply if callable(reply) else lambda number, headers: reply
    started = time.monotonic()
    with pytest.raises(ExpertServerError, match=message + f".*{PATIENCE}" * may_pass) as caught:
        draw(expert, [[3]])
    took = time.monotonic() - started
    assert endpoint.url in str(caught.value)
    if may_pass:
        assert 0.5 < took < 1.5
    else:
        assert len(endpoint.requests) == 1


def test_a_server_that_dies_and_comes_back(model):
    endpoint = VllmEndpoint(model, encode=lambda text: [2])
    expert = connected(endpoint, patience=0.8)
    with endpoint:
        expected = draw(expert)
    with pytest.raises(ExpertServerError, match=f"APIConnectionError: Connection error.{PATIENCE}"):
        draw(expert)
    revived = VllmEndpoint(model, encode=lambda text: [2], port=endpoint.server.server_port)
    with revived:
        assert draw(expert) == expected
    expert.endpoint.patience = 20.0
    revived = VllmEndpoint(model, encode=lambda text: [2], port=endpoint.server.server_port)
    threading.Timer(0.5, revived.__enter__).start()
    try:
        assert draw(expert) == expected  # before it is back
    finally:
        revived.__exit__()


def test_nobody_there_at_the_start_is_an_error_at_once(model):
    with VllmEndpoint(model, encode=lambda text: [2]) as endpoint:
        expert = connected(endpoint, patience=1000.0)
    with pytest.raises(
        ExpertServerError, match=r"APIConnectionError: Connection error\. Is `vllm serve` running there\?"
    ):
        draw(expert)


def test_one_that_fails_for_good_ends_the_others(endpoint):
    expert = connected(endpoint, patience=1000.0)
    draw(expert)
    endpoint.requests.clear()
    endpoint.trouble = lambda number, headers: (401, {}, "{}") if number == 5 else UNHAPPY
    with pytest.raises(ExpertServerError, match="AuthenticationError"):
        draw(expert, TEXTS * 2)
    time.sleep(0.5)
    asked = len(endpoint.requests)
    time.sleep(0.5)
    assert len(endpoint.requests) == asked  # nobody goes on


def test_pauses_grow_and_leave_the_random_numbers_of_training_alone(endpoint, monkeypatch):
    monkeypatch.delattr(random, "uniform")
    expert, times = connected(endpoint, patience=3.0), []
    draw(expert)

    def trouble(number, headers):
        times.append(time.monotonic())
        return UNHAPPY

    endpoint.trouble = trouble
    with pytest.raises(ExpertServerError):
        draw(expert, [[3]])
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert 3 <= len(pauses) <= 8
    assert max(pauses) > 4 * FIRST_PAUSE / 2  # the last one is cut short where patience ends


def test_the_key_is_sent_and_never_shown(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    expert, seen = connected(endpoint), []

    def quoting(number, headers):
        seen.append(headers["Authorization"])
        return (401, {}, f'{{"error": {{"message": "no such key: {seen[-1]}"}}}}')

    endpoint.trouble = quoting
    with pytest.raises(ExpertServerError, match="no such key: Bearer <key>") as error:
        draw(expert, [[3]])
    assert seen == ["Bearer sk-secret"]
    assert error.value.__suppress_context__  # a traceback would quote the server
    assert "sk-secret" not in repr(expert)


# ---- The checks at the start ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POLICY)


def grid_endpoint(encode=None, **kwargs) -> VllmEndpoint:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(EXPERT), AutoTokenizer.from_pretrained(EXPERT)
    return VllmEndpoint(model, encode or (lambda text: tokenizer(text).input_ids), **kwargs)


def connect(endpoint, tokenizer, name="the-expert", length=26, expert_tokenizer=None) -> ExpertServer:
    return connect_expert(
        endpoint.url,
        name,
        tokenizer,
        expert_tokenizer=expert_tokenizer,
        max_completion_length=length,
        temperature=0.9,
        eos_token_ids=[tokenizer.eos_token_id],
    )


def test_a_good_server_is_asked_three_things(tokenizer):
    with grid_endpoint() as endpoint:
        expert = connect(endpoint, tokenizer, expert_tokenizer=tokenizer)
        assert [path for path, _ in endpoint.requests] == ["/v1/models", "/v1/completions", "/v1/completions"]
        assert expert.vocab_size == len(tokenizer)
        assert endpoint.requests[-1][1]["temperature"] == 0.9
        assert endpoint.requests[-1][1]["logit_bias"] == {str(len(tokenizer) - 1): 0.0}
        prompt = tokenizer(path_dataset(1)["prompt"][0]).input_ids
        assert expert.draw([prompt], [0], 1.0)[0] < len(tokenizer)


def test_other_vocabularies(tokenizer):
    larger = AutoTokenizer.from_pretrained(POLICY)
    larger.add_tokens(["<more>"])
    with grid_endpoint() as endpoint:
        with (
            pytest.warns(UserWarning, match=r"The expert's tokenizer has no token '<more>' \(id 45\)"),
            pytest.raises(
                ExpertServerError, match=r"BadRequestError: .*out-of-vocab token ids"
            ),  # it cannot read it either
        ):
            connect(endpoint, larger, expert_tokenizer=tokenizer)
        endpoint.encode = lambda text: larger(text).input_ids
        with pytest.raises(ExpertServerError, match=r"BadRequestError: .*out-of-vocab token ids"):
            connect(endpoint, larger)
        endpoint.encode = lambda text: tokenizer(text).input_ids
        endpoint.model.resize_token_embeddings(len(larger))
        with pytest.warns(UserWarning, match="the expert never draws them"):
            assert connect(endpoint, larger, expert_tokenizer=tokenizer).vocab_size == len(tokenizer)
        other = AutoTokenizer.from_pretrained(POLICY)
        swapped = {token: index ^ 1 for token, index in other.get_vocab().items()}
        other.get_vocab = lambda: swapped
        with pytest.raises(ValueError, match=r"The expert's tokenizer maps .* but the policy's maps it to"):
            connect(endpoint, tokenizer, expert_tokenizer=other)


def test_the_package_is_asked_for(endpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=re.escape('not installed: pip install "trl-selective[server]"')):
        connected(endpoint)
