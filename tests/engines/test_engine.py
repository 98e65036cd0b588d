"""A server of the policy that is none, without vLLM. The real ones: tests/engines/test_vllm.py and tests/test_vllm_server.py."""

from importlib.util import find_spec

import pytest

from tests.endpoint import VllmEndpoint
from tests.models import tiny_model
from tests.training import make_trainer
from trl_selective.engines.coin import Coin
from trl_selective.engines.engine import ServedEngine, check_flips

MODEL = tiny_model(seed=1)


def address(endpoint) -> str:
    return endpoint.url.removesuffix("/v1")


def test_nobody_there():
    message = r"http://127\.0\.0\.1:9 does not answer as it should: APIConnectionError: .*Expected `vllm serve` with `--logits-"
    with pytest.raises(RuntimeError, match=message):
        ServedEngine("http://127.0.0.1:9")


@pytest.mark.parametrize("answer", ['{"data": []}', '{"data": [{"id": "a-model"}]}'])
def test_a_server_of_another_kind(answer):
    endpoint = VllmEndpoint(MODEL, encode=list, trouble=lambda number, headers: (200, {}, answer))
    message = r"serves no policy as `vllm serve` does\. Expected `vllm serve` with"
    with endpoint, pytest.raises(RuntimeError, match=message):
        ServedEngine(address(endpoint))


def test_the_key_of_another_endpoint_is_kept(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    seen = []
    answer = (200, {}, '{"data": [{"id": "policy", "max_model_len": 64}]}')
    with VllmEndpoint(
        MODEL, encode=list, trouble=lambda number, headers: seen.append(dict(headers)) or answer
    ) as endpoint:
        ServedEngine(address(endpoint))
    assert seen
    assert "sk-secret" not in str(seen)


def test_a_server_that_knows_nothing_of_coins():
    with VllmEndpoint(MODEL, encode=list) as endpoint:
        engine = ServedEngine(address(endpoint))
        assert engine.max_model_len == 64
        with pytest.raises(ValueError, match=r"does not guide: it drew \[\] where it had to draw 7\. Start it with"):
            check_flips(engine, Coin("entropy", 1.0, 1.0, 7, 7))
        (path, body) = endpoint.requests[-1]
        assert path == "/v1/completions"
        expected = {
            "max_tokens": 1,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        expected |= {"ignore_eos": True, "stop_token_ids": [7], "presence_penalty": 0.0, "frequency_penalty": 0.0}
        assert {name: body[name] for name in expected} == expected
        assert Coin.from_arguments(body["vllm_xargs"]) == (Coin("constant", 0.0, 1.0, 7, 7), body["seed"])


def test_a_policy_server_that_fails_ends_the_rollout():
    with VllmEndpoint(MODEL, encode=list) as endpoint:
        engine = ServedEngine(address(endpoint))
        endpoint.trouble = lambda number, headers: (400, {}, '{"error": {"message": "no such coin"}}')
        with pytest.raises(RuntimeError, match=r"does not answer as it should: BadRequestError: .*no such coin"):
            check_flips(engine, Coin("entropy", 1.0, 1.0, 7, 7))
        assert not engine.is_busy


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_trl_says_what_is_missing(tmp_path):
    with pytest.raises(
        ImportError, match=r"vLLM is not available and `use_vllm` is set to True\. Please install vLLM"
    ):
        make_trainer(tmp_path, use_vllm=True, vllm_mode="colocate", guided_sampler="auto")
