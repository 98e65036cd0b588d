"""Give each problem of a dataset whole completions of an expert, to train on with `expert_completions`.

The expert is a model in this process (on a GPU if there is one):

    python recipes/collect_expert_completions.py \
        --dataset_name problems.jsonl \
        --expert_model_name_or_path open-r1/OpenR1-Qwen-7B \
        --policy_tokenizer_name_or_path Qwen/Qwen2.5-3B --eos_token "<|im_end|>" \
        --reward_funcs boxed_accuracy \
        --num_completions 4 \
        --output_file data/with_expert.jsonl

or one behind an endpoint that speaks OpenAI's protocol, whose key, if it wants one, is in the variable OPENAI_API_KEY:

    python recipes/collect_expert_completions.py ... --base_url http://localhost:8000/v1 --expert_model_name_or_path served-name

Dataset, rewards and `eos_token` are those of `selective_grpo.py`. Every row goes to the file as soon as it is done: after
an interruption, the same command goes on from there.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from command_line import RecipeParser, as_dict, setting
from loading import ScriptArguments, choose_split, load_reward, load_splits, load_tokenizer
from transformers import AutoTokenizer
from trl import ModelConfig

from trl_selective.experts import (
    EndpointSource,
    ExpertServerError,
    LocalSource,
    Sampling,
    Tally,
    accelerator_or_cpu,
    collect,
    endpoint_client,
    load_expert,
    load_expert_tokenizer,
)
from trl_selective.grading import Verifier
from trl_selective.reporting.names import shown_name
from trl_selective.resuming import OtherRunError


@dataclass
class CollectArguments:
    output_file: str = field(metadata={"help": "JSON Lines file to write, or to go on with."})
    expert_model_name_or_path: str = field(
        metadata={"help": "Hub id or folder of the expert, or the name under which the endpoint serves it."}
    )
    policy_tokenizer_name_or_path: str | None = setting(
        "Hub id or folder of the policy, whose tokens log-probabilities are for; default: the expert's. Not with base_url."
    )
    reward_weights: list[float] | None = setting("One for each of `reward_funcs`; all 1 by default.")
    only_above: float | None = setting("Keep only completions with a total reward above this; 0.5 for right ones.")
    dtype: str | None = setting("Of an expert here; default: bfloat16 on accelerators, float32 on CPUs.")
    batch_size: int = setting("Completions that an expert here generates at once.", 32)
    chat_template_kwargs: dict[str, Any] | str | None = setting(
        "For the expert's chat template, as JSON, such as '{\"enable_thinking\": false}'."
    )
    base_url: str | None = setting("Of an endpoint, such as http://localhost:8000/v1.")
    concurrency: int = setting("Requests to the endpoint at once.", 16)
    timeout: float = setting("Seconds that a request may take.", 600)
    max_retries: int = setting("Of a request that fails for a reason that may pass.", 5)

    def __post_init__(self):
        self.chat_template_kwargs = as_dict(self.chat_template_kwargs)


def local_source(script: ScriptArguments, arguments: CollectArguments, sampling: Sampling) -> LocalSource:
    name = arguments.expert_model_name_or_path
    if arguments.policy_tokenizer_name_or_path and script.tokenizer_name_or_path:
        raise ValueError(
            f"policy_tokenizer_name_or_path={arguments.policy_tokenizer_name_or_path!r} and tokenizer_name_or_path={script.tokenizer_name_or_path!r} "
            "both name the policy's tokenizer: leave one unset."
        )
    model = load_expert(
        name, accelerator_or_cpu(), init_kwargs={"dtype": arguments.dtype} if arguments.dtype else None
    )
    policy = ModelConfig(model_name_or_path=arguments.policy_tokenizer_name_or_path or name)
    return LocalSource(
        model,
        load_expert_tokenizer(model),
        shown_name(name),
        sampling,
        policy_tokenizer=load_tokenizer(script, policy)
        or AutoTokenizer.from_pretrained(policy.model_name_or_path, trust_remote_code=False),
        batch_size=arguments.batch_size,
        chat_template_kwargs=arguments.chat_template_kwargs,
    )


def point_out_texts(prompts: Sequence, source: LocalSource) -> None:
    if source.tokenizer.chat_template is not None and isinstance(prompts[0], str):
        warnings.warn(
            "Prompts go to the expert as plain texts, though its tokenizer has a chat template. If it was trained on conversations, set system_prompt "
            "to that of the training to come.",
            stacklevel=3,
        )


def endpoint_source(script: ScriptArguments, arguments: CollectArguments, sampling: Sampling) -> EndpointSource:
    settings = {
        "policy_tokenizer_name_or_path": arguments.policy_tokenizer_name_or_path,
        "tokenizer_name_or_path": script.tokenizer_name_or_path,
        "eos_token": script.eos_token,
    }
    if given := [f"{name}={value!r}" for name, value in settings.items() if value is not None]:
        raise ValueError(
            f"{', '.join(given)}: that is for log-probabilities, which are not taken from an endpoint. Leave it unset, or leave base_url unset."
        )
    client = endpoint_client(arguments.base_url, timeout=arguments.timeout, max_retries=arguments.max_retries)
    return EndpointSource(
        client,
        arguments.expert_model_name_or_path,
        sampling,
        concurrency=arguments.concurrency,
        chat_template_kwargs=arguments.chat_template_kwargs,
    )


def summary(tally: Tally, output_file: str) -> str:
    right = f", {tally.num_right / tally.num_scored:.1%} of {tally.num_scored} right" if tally.num_scored else ""
    return (
        f"{tally.num_resumed + tally.num_rows} rows are in {output_file}, {tally.num_resumed} of them from an earlier run. In this run:\n"
        f"  {tally.num_drawn} completions drawn{right}\n"
        f"  {tally.num_unfinished} dropped, cut off or empty\n"
        f"  {tally.num_kept} kept, {tally.num_without_logprobs} of them without log-probabilities"
    )


def main(script: ScriptArguments, arguments: CollectArguments, sampling: Sampling, parser: RecipeParser) -> None:
    with parser.user_errors():
        rows = choose_split(load_splits(script), script.dataset_train_split, "dataset_train_split")
        verifier = Verifier([load_reward(name) for name in script.reward_funcs or ()], arguments.reward_weights)
        make_source = local_source if arguments.base_url is None else endpoint_source
        source = make_source(script, arguments, sampling)
        if isinstance(source, LocalSource):
            point_out_texts(rows["prompt"], source)
    with parser.clear_errors(OtherRunError, ExpertServerError):
        tally = collect(rows, source, verifier, arguments.output_file, only_above=arguments.only_above)
    print(summary(tally, arguments.output_file))


if __name__ == "__main__":
    kinds = {"problems and rewards": ScriptArguments, "expert and file": CollectArguments, "sampling": Sampling}
    parser = RecipeParser(kinds, "Give each problem of a dataset whole completions of an expert.")
    main(*parser.parse_args_and_config(), parser)
