"""Evaluate a model: greedy pass@1, avg@k and unbiased pass@k, with 95 % intervals, on benchmarks or on any dataset.

    python recipes/evaluate.py --model_name_or_path outputs/Qwen2.5-3B-mentor \\
        --benchmarks math500 aime24 aime25 amc minerva olympiadbench gpqa_diamond mmlu_pro \\
        --backend vllm --output_dir outputs/Qwen2.5-3B-mentor/evaluation

Benchmarks are sampled as the MENTOR paper does: AIME and AMC 32 times at temperature 0.6, the others greedily; `--num_samples`, `--temperature` and
the others below change that for all of them. A dataset of your own, with the answer in a column, or with a reward function:

    python recipes/evaluate.py --model_name_or_path outputs/mine --dataset_name problems.jsonl \\
        --prompt_column question --answer_column answer --num_samples 16 --temperature 1.0 --output_dir outputs/mine/evaluation

The model is a folder or a Hub id, also of a LoRA adapter. Prompts are texts, as in training without a system prompt; `--system_prompt` (the one of
training) or `--apply_chat_template true` puts them into the chat template. Every problem goes to `NAME.jsonl` in the output folder as soon as it is done: after
an interruption, the same command goes on from there. At the end, `results.json` and `results.md` are written beside it.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_line import RecipeParser, as_dict, setting
from evaluation_problems import ProblemArguments, SamplingArguments, Task, load_tasks
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_selective.evaluation import (
    Backend,
    TransformersBackend,
    VllmBackend,
    adapter_config,
    evaluate_to_file,
    summarize,
    table,
)
from trl_selective.experts import accelerator_or_cpu
from trl_selective.reporting.card import add_evaluation
from trl_selective.reporting.inputs import read_json
from trl_selective.reporting.names import shown_name
from trl_selective.resuming import OtherRunError, write_whole

BACKENDS = ("transformers", "vllm")


@dataclass
class ModelArguments:
    model_name_or_path: str | None = setting("Hub id or folder of a model, or of a LoRA adapter.")
    model_revision: str | None = setting("Of a Hub id.")
    dtype: str | None = setting("Such as bfloat16; by default that on accelerators, and float32 on CPUs.")
    attn_implementation: str | None = setting("Of Transformers, such as sdpa or flash_attention_2.")
    eos_token: str | None = setting("End token, if not the tokenizer's.")
    chat_template: str | None = setting("File with a Jinja template to use instead of the tokenizer's.")
    chat_template_kwargs: dict[str, Any] | str | None = setting(
        "For the chat template, as JSON, such as '{\"enable_thinking\": false}': those of training."
    )

    def __post_init__(self):
        self.chat_template_kwargs = as_dict(self.chat_template_kwargs)


@dataclass
class RunArguments:
    output_dir: str | None = setting("Folder for completions and results; goes on with what is there.")
    backend: str = setting(f"What generates: {' or '.join(BACKENDS)}.", BACKENDS[0])
    batch_size: int | None = setting("Completions generated at once; default: 64, and 2048 with vLLM.")
    vllm_init_kwargs: dict[str, Any] | str | None = setting(
        "For `vllm.LLM`, as JSON, such as '{\"tensor_parallel_size\": 4}'."
    )
    grading_timeout: float = setting(
        "Seconds for grading one completion, each in a process of its own; those that take longer count as wrong and are listed. 0: grade whole "
        "batches here, without a limit.",
        10.0,
    )
    correct_above: float = setting("A completion is right when its reward exceeds this.", 0.5)

    def __post_init__(self):
        self.vllm_init_kwargs = as_dict(self.vllm_init_kwargs)
        if self.batch_size is None:
            self.batch_size = 2048 if self.backend == "vllm" else 64


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    name, revision = arguments.model_name_or_path, arguments.model_revision
    adapter = adapter_config(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:  # an adapter without one has its base model's
        if adapter is None:
            raise ValueError(
                f"model_name_or_path: no tokenizer of {name!r} can be loaded. Expected a Hub id, or a folder with a model and its tokenizer. {error}"
            ) from error
        base = adapter.base_model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(base, revision=adapter.revision, trust_remote_code=False)
    if arguments.eos_token is not None:
        if arguments.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"eos_token={arguments.eos_token!r} is not in the vocabulary of {name}.")
        tokenizer.eos_token = arguments.eos_token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if arguments.chat_template is not None:
        tokenizer.chat_template = Path(arguments.chat_template).read_text(encoding="utf-8")
    return tokenizer


def load_model(model: ModelArguments, dtype: str) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            dtype=dtype,
            attn_implementation=model.attn_implementation,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"model_name_or_path: expected a model with weights in safetensors, got {model.model_name_or_path!r}. Older ones can be written anew: "
            f"`AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)`. {error}"
        ) from error


def load_backend(model: ModelArguments, run: RunArguments, tokenizer: PreTrainedTokenizerBase) -> Backend:
    device = accelerator_or_cpu()
    dtype = model.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    if run.backend == "vllm":
        init_kwargs = {"dtype": dtype, **run.vllm_init_kwargs}
        return VllmBackend(model.model_name_or_path, tokenizer, revision=model.model_revision, init_kwargs=init_kwargs)
    return TransformersBackend(load_model(model, dtype).to(device).eval(), tokenizer, run.batch_size)


def identity(model: ModelArguments) -> dict[str, Any]:
    """What says which model it is: its name, and when the weights of a folder were written."""
    name = model.model_name_or_path
    files = [path for kind in ("safetensors", "bin") for path in Path(name).glob(f"*.{kind}")]
    weights = max((path.stat().st_mtime_ns for path in files), default=None)
    return {"model": shown_name(name), "model_revision": model.model_revision, "weights_written_ns": weights}


def check(model: ModelArguments, run: RunArguments) -> None:
    if model.model_name_or_path is None:
        raise ValueError(
            "model_name_or_path is not set: give the Hub id or the folder of a model, or of a LoRA adapter."
        )
    if run.output_dir is None:
        raise ValueError("output_dir is not set: give a folder for completions and results.")
    if run.backend not in BACKENDS:
        raise ValueError(f"backend: got {run.backend!r}, expected one of {list(BACKENDS)}.")
    if run.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {run.batch_size}.")
    if run.grading_timeout < 0:
        raise ValueError(f"grading_timeout must be at least 0, got {run.grading_timeout}.")


def earlier_results(path: Path, who: dict[str, Any]) -> dict[str, Any]:
    """Read the results of other benchmarks that are in the folder."""
    results = read_json(path) if path.exists() else {**who, "benchmarks": {}}
    different = [name for name, value in who.items() if results.get(name) != value]
    if different:
        what = (
            "other weights, since the model was written again"
            if different == ["weights_written_ns"]
            else f"{different[0]}={results.get(different[0])!r}, got {who[different[0]]!r}"
        )
        raise ValueError(f"{path} has results of {what}. Name another output_dir, or delete {path.parent}.")
    return results


def check_prompts(tasks: list[Task], tokenizer: PreTrainedTokenizerBase, is_meant: bool) -> None:
    """Conversations need a chat template; plain texts for a model that has one are pointed out, unless they are meant."""
    has_template = tokenizer.chat_template is not None
    is_plain = [isinstance(task.problems[0]["prompt"], str) for task in tasks]
    if not has_template and not all(is_plain):
        raise ValueError(
            f"The tokenizer of {Path(tokenizer.name_or_path).name} has no chat template, which prompts that are conversations need. Give one as "
            "chat_template, or leave system_prompt and apply_chat_template unset."
        )
    if has_template and any(is_plain) and not is_meant:
        warnings.warn(
            "Prompts go to the model as plain texts, though its tokenizer has a chat template. If it was trained on conversations, set "
            "system_prompt to that of its training, or apply_chat_template to true (false: this is meant).",
            stacklevel=3,
        )


def main(
    model: ModelArguments,
    problems: ProblemArguments,
    sampling: SamplingArguments,
    run: RunArguments,
    parser: RecipeParser,
) -> None:
    with parser.user_errors():
        check(model, run)
        who, output = identity(model), Path(run.output_dir)
        results = earlier_results(output / "results.json", who)
        tasks = load_tasks(problems, sampling)
        tokenizer = load_tokenizer(model)
        check_prompts(tasks, tokenizer, is_meant=problems.apply_chat_template is not None)
        backend = load_backend(model, run, tokenizer)
    settings = {**who, "backend": run.backend, "dtype": model.dtype, "eos_token": tokenizer.eos_token}
    for task in tasks:
        path = output / f"{task.name}.jsonl"
        where = {"dataset": task.dataset, "config": task.config, "split": task.split}
        with parser.clear_errors(OtherRunError):
            evaluate_to_file(
                task.problems,
                backend,
                tokenizer,
                task.reward_func,
                task.protocol,
                path,
                settings={**settings, **where, "chat_template": tokenizer.chat_template},
                batch_size=run.batch_size,
                correct_above=run.correct_above,
                grading_timeout=run.grading_timeout,
                chat_template_kwargs=model.chat_template_kwargs,
                description=task.name,
            )
        found = summarize(path, task.protocol, sampling.ks)
        results["benchmarks"][task.name] = {**where, **found, "backend": run.backend, "dtype": model.dtype}
        write_whole(output / "results.json", json.dumps(results, indent=2) + "\n")
        write_whole(output / "results.md", table(results))
    print(f"\n{table(results)}\nCompletions, results.json and results.md are in {output}.")
    tell_card(Path(model.model_name_or_path), output)


def tell_card(model: Path, output: Path) -> None:
    """Results in the folder `evaluation` of a model come into its card."""
    if output.resolve() == (model / "evaluation").resolve() and (model / "README.md").exists():
        add_evaluation(model)
        print(f"They are in {model / 'README.md'} as well.")


if __name__ == "__main__":
    kinds = {
        "model": ModelArguments,
        "problems": ProblemArguments,
        "sampling (default: the benchmark's protocol; greedy for a dataset)": SamplingArguments,
        "this run": RunArguments,
    }
    parser = RecipeParser(kinds, "Evaluate a model on benchmarks, or on problems of your own.")
    main(*parser.parse_args_and_config(), parser)
