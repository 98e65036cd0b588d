"""What can a model do on problems it was not trained on? Unbiased pass@k, and how many different right answers it finds."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_selective.evaluation.protocol import check_batches, check_problems
from trl_selective.experts import evaluation_mode
from trl_selective.functional.diversity import pass_at_k
from trl_selective.grading import grade
from trl_selective.sampling.unguided import encode_prompt, end_token_ids, sample_completions


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        pass_at_k: k -> mean over problems of the chance that one of k samples is right.
        standard_error: k -> standard error of that mean over problems; NaN for a single problem.
        distinct_correct: mean number of different right answers per problem, among its samples.
        num_problems, num_samples: how many problems, and samples of each.
        completions, completion_ids, is_correct: what was sampled, by problem.
    """

    pass_at_k: dict[int, float]
    standard_error: dict[int, float]
    distinct_correct: float
    num_problems: int
    num_samples: int
    completions: list[list[str]] = field(repr=False)
    is_correct: list[list[bool]] = field(repr=False)
    completion_ids: list[list[list[int]]] = field(repr=False, default_factory=list)

    def to_dict(self) -> dict:
        """The numbers, without the samples."""
        samples = ("completions", "completion_ids", "is_correct")
        return {name: value for name, value in vars(self).items() if name not in samples}


def evaluate(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward_func: Callable,
    *,
    num_samples: int,
    ks: Sequence[int] = (1,),
    max_completion_length: int = 256,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    correct_above: float = 0.5,
    answer_key: Callable[[str], Hashable] = str.strip,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    description: str | None = "evaluate",
) -> Evaluation:
    """
    Sample completions for each problem and grade them. The model's mode and the random number generators are left as they were.

    Args:
        model: a causal language model.
        processing_class: its tokenizer; with a chat template if prompts are conversations.
        dataset: a column `prompt` (texts or conversations), and whatever `reward_func` asks for.
        reward_func: called as TRL calls it: `reward_func(prompts=..., completions=..., completion_ids=..., **columns)`.
        num_samples: completions per problem.
        ks: the k of pass@k, each at most `num_samples`.
        max_completion_length: tokens.
        temperature: >= 0; at 0 the most likely token is taken, and one sample says it all.
        batch_size: completions generated at once.
        seed: of the sampling.
        correct_above: a completion is right when its reward exceeds this.
        answer_key: right answers with equal keys count as the same.
        chat_template_kwargs: further arguments of `apply_chat_template`, for conversations.
        description: of the progress bar; None for no bar.

    Raises:
        ValueError: if there are no problems, no column `prompt`, no token to pad with, or a k beyond `num_samples`.
    """
    check_problems(dataset)
    if not ks or min(ks) < 1 or max(ks) > num_samples:
        raise ValueError(f"pass@k needs 1 <= k <= num_samples = {num_samples}, got {list(ks)}. Draw more samples.")
    check_batches(processing_class, batch_size)
    rows = dataset.select([problem for problem in range(len(dataset)) for _ in range(num_samples)])
    completions: list[str] = []
    completion_ids: list[list[int]] = []
    rewards: list[float | None] = []
    ends = end_token_ids(model.generation_config, processing_class)
    devices = [] if model.device.type == "cpu" else [model.device]
    with evaluation_mode(model), torch.random.fork_rng(devices, device_type=model.device.type):
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(rows), batch_size), desc=description, disable=description is None):
            batch = rows[start : start + batch_size]
            token_ids = sample_completions(
                model,
                [encode_prompt(processing_class, prompt, chat_template_kwargs) for prompt in batch["prompt"]],
                max_completion_length=max_completion_length,
                eos_token_ids=ends,
                pad_token_id=processing_class.pad_token_id,
                temperature=temperature,
            )
            texts = processing_class.batch_decode(token_ids, skip_special_tokens=True)
            completions += texts
            completion_ids += token_ids
            rewards += grade(reward_func, batch, texts, token_ids)

    per_problem = [slice(start, start + num_samples) for start in range(0, len(rows), num_samples)]
    correct = [reward is not None and reward > correct_above for reward in rewards]
    num_correct = torch.tensor([sum(correct[part]) for part in per_problem])
    estimates = {k: pass_at_k(num_samples, num_correct, k) for k in ks}
    distinct = [
        {answer_key(text) for text, right in zip(completions[part], correct[part], strict=True) if right}
        for part in per_problem
    ]
    return Evaluation(
        pass_at_k={k: estimate.mean().item() for k, estimate in estimates.items()},
        standard_error={k: _standard_error(estimate) for k, estimate in estimates.items()},
        distinct_correct=sum(map(len, distinct)) / len(dataset),
        num_problems=len(dataset),
        num_samples=num_samples,
        completions=[completions[part] for part in per_problem],
        is_correct=[correct[part] for part in per_problem],
        completion_ids=[completion_ids[part] for part in per_problem],
    )


def _standard_error(values: Float[Tensor, "problems"]) -> float:
    """The standard error of the mean of `values`."""
    num = len(values)
    return ((values - values.mean()).square().sum() / (num * (num - 1))).sqrt().item()
