"""An endpoint is asked as its protocol says, patiently, and never led astray."""

import re
import sys
import threading
import time

import pytest

from tests.endpoint import Endpoint, ExpertAnswers
from tests.training import path_dataset
from trl_selective.experts import EndpointSource, ExpertServerError, Sampling, collect, endpoint_client
from trl_selective.grading import Verifier

SAMPLING = Sampling(num_completions=2, max_completion_length=26, temperature=1.3, seed=7)
AGAIN_AT_ONCE = {"Retry-After-Ms": "1"}


def canned(prompt, seed, length, temperature):
    return f"{prompt}, {seed}", "stop"


def source_of(endpoint: Endpoint, sampling: Sampling = SAMPLING, *, max_retries: int = 2, concurrency: int = 4):
    client = endpoint_client(endpoint.url, timeout=20, max_retries=max_retries)
    return EndpointSource(client, "some/expert", sampling, concurrency=concurrency)


def texts_of(source: EndpointSource, prompts: list, first: int = 0) -> list[list[str]]:
    return [[completion.text for completion in row] for row in source.complete(prompts, first)]


def in_trouble_from(number: int, reply):
    return lambda request, headers: reply if request >= number else None


@pytest.mark.parametrize("is_chat", [False, True], ids=["text", "chat"])
def test_the_served_expert_answers(is_chat):
    expert = ExpertAnswers()
    texts = path_dataset(3)["prompt"][:]
    prompts = [[{"role": "user", "content": text}] for text in texts] if is_chat else texts
    with Endpoint(expert) as endpoint:
        answers = list(source_of(endpoint).complete(prompts, 0))
    expected = [[expert(text, SAMPLING.seed_of(row, i), 26, 1.3) for i in range(2)] for row, text in enumerate(texts)]
    assert [[(each.text, "stop" if each.is_whole else "length") for each in row] for row in answers] == expected
    assert len({each.text for row in answers for each in row}) == 6  # another seed for every completion
    assert all(each.logps is None for row in answers for each in row)
    paths, bodies = zip(*endpoint.requests, strict=True)
    assert set(paths) == {"/v1/chat/completions" if is_chat else "/v1/completions"}
    assert {body["model"] for body in bodies} == {"some/expert"}


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [("a", None), ([{"role": "user", "content": "a"}], {"enable_thinking": False})],
    ids=["text", "chat"],
)
def test_the_chat_template_of_the_server_gets_its_arguments(prompt, sent):
    with Endpoint(canned) as endpoint:
        client = endpoint_client(endpoint.url, timeout=20, max_retries=0)
        source = EndpointSource(client, "some/expert", SAMPLING, chat_template_kwargs={"enable_thinking": False})
        list(source.complete([prompt], 0))
    assert {str(body.get("chat_template_kwargs")) for _, body in endpoint.requests} == {str(sent)}
    assert source.settings["chat_template_kwargs"] == {"enable_thinking": False}


def test_order_is_kept_and_requests_are_few_at_once():
    at_once, most, lock = 0, 0, threading.Lock()

    def slower_first(prompt, seed, length, temperature):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.05 / (1 + int(prompt)))
        with lock:
            at_once -= 1
        return prompt, "stop"

    with Endpoint(slower_first) as endpoint:
        texts = texts_of(source_of(endpoint, concurrency=3), [str(i) for i in range(8)])
    assert texts == [[str(i)] * 2 for i in range(8)]
    assert most == 3


def test_it_starts_where_it_is_told():
    with Endpoint(canned) as endpoint:
        everything = texts_of(source_of(endpoint), ["a", "b", "c", "d"])
        assert texts_of(source_of(endpoint), ["a", "b", "c", "d"], first=3) == everything[3:]
        assert texts_of(source_of(endpoint), ["a", "b", "c", "d"], first=4) == []
    assert len(endpoint.requests) == 8 + 2


@pytest.mark.parametrize(
    ("text", "reason", "is_whole"),
    [("R 8", "stop", True), ("R 8", "length", False), ("R 8", "content_filter", False), (" \n", "stop", False), (None, "stop", False)],
)  # fmt: skip
@pytest.mark.parametrize("prompt", ["a", [{"role": "user", "content": "a"}]], ids=["text", "chat"])
def test_what_is_a_whole_completion(prompt, text, reason, is_whole):
    with Endpoint(lambda *question: (text, reason)) as endpoint:
        ((first, _),) = source_of(endpoint).complete([prompt], 0)
    assert (first.text, first.is_whole) == (text or "", is_whole)


def test_trouble_that_passes():
    with Endpoint(canned) as endpoint:
        expected = texts_of(source_of(endpoint), ["a", "b"])
        endpoint.requests.clear()
        endpoint.trouble = lambda number, headers: (500, AGAIN_AT_ONCE, "{}") if number < 2 else None
        assert texts_of(source_of(endpoint), ["a", "b"]) == expected
    assert len(endpoint.requests) == 4 + 2


def test_trouble_that_stays_loses_no_finished_row(tmp_path):
    """One request at a time, one for each row: after rows 0 and 1 the server breaks down."""
    rows, path, whole_path = path_dataset(4), tmp_path / "out.jsonl", tmp_path / "unbroken.jsonl"
    sampling = Sampling(max_completion_length=26)
    with Endpoint(canned) as endpoint:
        source = source_of(endpoint, sampling, concurrency=1)
        collect(rows, source, Verifier([]), whole_path)
        endpoint.requests.clear()
        endpoint.trouble = in_trouble_from(2, (500, AGAIN_AT_ONCE, '{"error": {"message": "out of memory"}}'))
        message = (
            r"Row 2 got no completion from 'some/expert' \(max_retries=2\): InternalServerError: .*out of memory.* "
            "Rows before it are kept: start again"
        )
        with pytest.raises(ExpertServerError, match=message):
            collect(rows, source, Verifier([]), path)
        assert len(endpoint.requests) == 2 + 3  # tried three times
        assert path.read_text().splitlines() == whole_path.read_text().splitlines()[:2]
        endpoint.requests.clear()
        endpoint.trouble = lambda number, headers: None
        tally = collect(rows, source, Verifier([]), path)
    assert path.read_bytes() == whole_path.read_bytes()
    assert (tally.num_resumed, tally.num_rows, len(endpoint.requests)) == (2, 2, 2)


def test_nobody_waits_for_answers_that_nobody_reads():
    """One row is read while the server still thinks about the others, of which it is asked no more."""
    may_answer, answered = threading.Event(), []

    def first_at_once(prompt, *question):
        if prompt != "0":
            may_answer.wait(20)
        answered.append(prompt)
        return prompt, "stop"

    with Endpoint(first_at_once) as endpoint:
        answers = source_of(endpoint, Sampling(), concurrency=2).complete([str(i) for i in range(8)], 0)
        assert next(answers)[0].text == "0"
        answers.close()
        assert answered == ["0"]
        may_answer.set()
    assert len(endpoint.requests) <= 3  # the row that was read, and two at once


def test_redirects_are_not_followed():
    with Endpoint(canned) as elsewhere, Endpoint(canned) as endpoint:
        endpoint.trouble = in_trouble_from(0, (307, {"Location": f"{elsewhere.url}/completions"}, "{}"))
        message = f"It redirects to '{elsewhere.url}/completions', which is not followed: if that is right, give it as base_url"
        with pytest.raises(ExpertServerError, match=re.escape(message)):
            texts_of(source_of(endpoint), ["a"])
    assert elsewhere.requests == []


def test_the_key_is_sent_and_never_shown(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    seen = []

    def quoting(number, headers):
        seen.append(headers["Authorization"])
        return (401, {}, f'{{"error": {{"message": "no such key: {seen[-1]}"}}}}') if number >= 2 else None

    with (
        Endpoint(canned, quoting) as endpoint,
        pytest.raises(ExpertServerError, match="no such key: Bearer <key>") as error,
    ):
        collect(path_dataset(2), source_of(endpoint, concurrency=1), Verifier([]), tmp_path / "out.jsonl")
    assert set(seen) == {"Bearer sk-secret"}
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__  # a traceback would quote the server
    assert "sk-secret" not in "".join(capfd.readouterr())
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(written) == {"out.jsonl", ".out.jsonl.settings"}
    assert written["out.jsonl"].count("\n") == 1
    assert not any("sk-secret" in text for text in written.values())


def test_a_place_that_is_no_endpoint():
    page = (200, {"Content-Type": "text/html"}, "<html>Welcome</html>")
    message = r"has no `choices`. Does base_url end as the server wants it, often in /v1\?"
    with Endpoint(canned, in_trouble_from(0, page)) as place, pytest.raises(ExpertServerError, match=message):
        texts_of(source_of(place), ["a"])


def test_nobody_there():
    with Endpoint(canned) as endpoint:
        source = source_of(endpoint, max_retries=0)
    with pytest.raises(
        ExpertServerError, match=r"\(max_retries=0\): APIConnectionError: Connection error\. Rows before it"
    ):
        texts_of(source, ["a"])


def test_the_package_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r'not installed: pip install "trl-selective\[server\]"'):
        endpoint_client("http://localhost", timeout=1, max_retries=0)
