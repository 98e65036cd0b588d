"""Servers that cannot guide, fail while they guide, or lead astray."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.bad_input.case import Case, Error
from tests.endpoint import VllmEndpoint
from tests.training import EXPERT, POLICY, length_reward, make_trainer
from trl_selective.experts import ExpertServerError

NOWHERE = "Training has stopped at step 0. Once this is mended, start it again: it has no checkpoint."
Trouble = Callable[..., Any]


@cache
def expert() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(EXPERT)


def serving(**settings) -> VllmEndpoint:
    tokenizer = AutoTokenizer.from_pretrained(EXPERT)
    return VllmEndpoint(expert(), **{"encode": lambda text: tokenizer(text).input_ids, **settings})


def connect(folder: Path, url: str, **changes):
    run = {
        "guided_sampler": "coin",
        "expert_model": VllmEndpoint.name,
        "per_device_train_batch_size": 8,
        "reward_funcs": length_reward,
    }
    return make_trainer(folder, expert_model_server_url=url, **{**run, "expert_model_server_patience": 0.5, **changes})


def refused(
    given: str,
    says: str,
    changes: Callable[[], dict[str, Any]] = dict,
    trouble: Trouble | None = None,
    kind=ExpertServerError,
    **server,
) -> Case:
    """When the trainer is made."""

    def cause(folder: Path) -> None:
        with serving(**server) as endpoint:
            endpoint.trouble = trouble or endpoint.trouble
            connect(folder, endpoint.url, **changes())

    return Error(given, cause, says, kind)


def stopped(given: str, reply: Any, says: str) -> Case:
    """In the first step, of a server that was in order when the trainer was made."""

    def cause(folder: Path) -> None:
        with serving() as endpoint:
            trainer = connect(folder, endpoint.url)
            endpoint.trouble = lambda number, headers: reply
            trainer.train()

    return Error(given, cause, f"{says}\n{NOWHERE}", ExpertServerError)


def goes_away(folder: Path) -> None:
    with serving() as endpoint:
        trainer = connect(folder, endpoint.url)
    trainer.train()


def is_not_there(folder: Path) -> None:
    with serving() as endpoint:
        pass
    connect(folder, endpoint.url)


def token(text: str, reason: str = "length"):
    choice = f'{{"index": 0, "text": "", "finish_reason": "{reason}", "logprobs": {{"tokens": ["{text}"]}}}}'
    return 200, {}, f'{{"choices": [{choice}]}}'


def only_chats(number: int, headers):
    return (404, {}, "{}") if number else None


def reads_backwards(text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(POLICY)(text).input_ids[::-1]


PAGE = (200, {"Content-Type": "text/html"}, "<html>Welcome</html>")
ABOUT = (
    "With `expert_model_server_url` and `expert_model_server_patience=0.5`. A failure that may pass is borne for as long as patience lasts; training "
    "never goes on without the expert. Redirects are not followed, so that no key gets to another place."
)
SECTIONS = {
    "Expert servers": (
        ABOUT,
        [
            refused("no name of an expert", "expert_model_server_url='http://…/v1' needs the name under which the server knows the expert, got NoneType. Set `expert_model_name_or_path` to it, or unset the url to guide with a model in this process.", lambda: {"expert_model": None}, kind=ValueError),
            refused("a model in place of a name", "expert_model_server_url='http://…/v1' needs the name under which the server knows the expert, got LlamaForCausalLM. Set `expert_model_name_or_path` to it, or unset the url to guide with a model in this process.", lambda: {"expert_model": expert()}, kind=ValueError),
            refused("a name that it does not serve", "http://…/v1 serves ['the-expert'], but not 'another'. Set expert_model_name_or_path to a name that it serves.", lambda: {"expert_model": "another"}),
            refused("a shorter context than `max_completion_length`", "http://…/v1 takes texts of 26 tokens, but completions alone may have max_completion_length=26. Start it with a larger `--max-model-len`: the longest prompt and completion, and one token more.", longest=26),
            refused("another vocabulary", "The expert behind http://…/v1 reads '…' as the tokens […], but the policy's tokenizer reads it as […]. Token-level guidance needs one vocabulary: serve an expert of the policy's model family.", encode=reads_backwards),
            refused("an endpoint for chats alone", "The expert 'the-expert' behind http://…/v1 does not answer as it should: NotFoundError: …404…. Expected an endpoint for completions, as `vllm serve` has one (one for chats alone will not do); its address often ends in /v1.", trouble=only_chats),
            refused("a web page", "The expert 'the-expert' behind http://…/v1 does not answer as it should: its answer is not what `vllm serve` answers (…). Is `vllm serve` running there? Its log may say more.", trouble=lambda number, headers: PAGE),
            refused("it wants a key", "The expert 'the-expert' behind http://…/v1 does not answer as it should: AuthenticationError: …401…. Put its key into the environment variable OPENAI_API_KEY.", trouble=lambda number, headers: (401, {}, "{}")),
            refused("it redirects to another host", "The expert 'the-expert' behind http://…/v1 does not answer as it should: APIStatusError: …307…. It redirects to 'http://elsewhere/v1', which is not followed: if that is right, give it as expert_model_server_url. Is `vllm serve` running there? Its log may say more.", trouble=lambda number, headers: (307, {"Location": "http://elsewhere/v1"}, "{}")),
            Error("nobody there", is_not_there, "The expert 'the-expert' behind http://…/v1 does not answer as it should: APIConnectionError: …. Is `vllm serve` running there? Its log may say more.", ExpertServerError),
            Error("it goes away while training", goes_away, f"The expert 'the-expert' behind http://…/v1 does not answer as it should: APIConnectionError: …. This went on for expert_model_server_patience=0.5 seconds. Start the server again, or be more patient.\n{NOWHERE}", ExpertServerError),
            stopped("it fails while training", (503, {}, '{"error": {"message": "out of memory"}}'), "The expert 'the-expert' behind http://…/v1 does not answer as it should: InternalServerError: …out of memory…. This went on for expert_model_server_patience=0.5 seconds. Start the server again, or be more patient."),
            stopped("it refuses a request while training", (400, {}, '{"error": {"message": "maximum context length"}}'), "The expert 'the-expert' behind http://…/v1 does not answer as it should: BadRequestError: …maximum context length…. If the text is too long for it, start it with a larger `--max-model-len`: the longest prompt and completion, and one token more. If it does not know a token, serve an expert that has embeddings for all tokens of the policy."),
            stopped("it answers nonsense", (200, {}, '{"choices": ['), "The expert 'the-expert' behind http://…/v1 does not answer as it should: its answer is not what `vllm serve` answers (…). This went on for expert_model_server_patience=0.5 seconds. Start the server again, or be more patient."),
            stopped("it answers with texts in place of token ids", token("Hello"), "The expert 'the-expert' behind http://…/v1 does not answer as it should: its answer is not what `vllm serve` answers (ValueError: expected tokens like 'token_id:123', got ['Hello']). This went on for expert_model_server_patience=0.5 seconds. Start the server again, or be more patient."),
            stopped("it draws a token that the policy does not have", token("token_id:45"), "The expert server at http://…/v1 drew token 45, but the policy's end at 44. Serve an expert with the policy's vocabulary, or one that was trained never to draw the padding behind it."),
            stopped("it ends with a token that does not end the policy's answers", token("token_id:4", "stop"), "The expert server at http://…/v1 ends its answers with token 4, but the policy ends with [1] only, so that rollouts would run on behind the expert's end. Give the policy a tokenizer with this `eos_token`, or add it to its `generation_config.eos_token_id`."),
        ],
    ),
}  # fmt: skip
