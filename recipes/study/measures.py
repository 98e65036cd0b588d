"""What is measured of a model: how often it is right, in how many ways, how sure it is, and whose habits its answers have."""

import datasets
import torch
from task import FILLER
from tasks import Problem, Task

from trl_selective.evaluation import evaluate
from trl_selective.experts import completion_laws, evaluation_mode
from trl_selective.functional.mixed_policy import entropy


def as_dataset(problems: list[Problem]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": [problem.prompt for problem in problems]})


def measure(model, tokenizer, task: Task, problems: list[Problem], *, num_samples: int, seed: int) -> dict:
    """
    Answers at temperature 1 to all problems, and what they show.

    Args:
        num_samples: answers to each problem.
        seed: that they are drawn with.

    Returns:
        num_correct, distinct_correct: by problem, right answers and different right answers among `num_samples`.
        entropy: mean over the tokens of all answers, nats.
        length: mean number of tokens, the end token included.
        filler: share of answers with a filler.
        shortest: share of the right answers that are as short as can be.
        habits: word -> how often it occurs per answer, for moves and the filler.
    """
    result = evaluate(
        model,
        tokenizer,
        as_dataset(problems),
        task.reward,
        num_samples=num_samples,
        max_completion_length=task.max_completion_length,
        seed=seed,
    )
    solutions, lengths = [], []
    for problem, completions in zip(problems, result.completions, strict=True):
        visited = [task.solution(problem.prompt, completion) for completion in completions]
        solutions.append([cells for cells in visited if cells is not None])
        lengths.append(problem.distances(problem.goal)[problem.start])
    answers = [completion for completions in result.completions for completion in completions]
    right = [(len(cells), least) for found, least in zip(solutions, lengths, strict=True) for cells in found]
    words = [word for answer in answers for word in answer.split()]
    kinds = [FILLER, *(word for word in task.words if not word.isdigit() and word not in (">", ":", FILLER))]
    prompts = [problem.prompt for problem in problems for _ in range(num_samples)]
    return {
        "num_samples": num_samples,
        "num_correct": [len(found) for found in solutions],
        "distinct_correct": [len(set(found)) for found in solutions],
        "entropy": mean_entropy(model, tokenizer, prompts, answers),
        "length": sum(len(answer.split()) + 1 for answer in answers) / len(answers),
        "filler": sum(FILLER in answer.split() for answer in answers) / len(answers),
        "shortest": sum(moves == least for moves, least in right) / len(right) if right else None,
        "habits": {kind: words.count(kind) / len(answers) for kind in kinds},
    }


def greedy(model, tokenizer, task: Task, problems: list[Problem]) -> float:
    """Share of the problems that the most likely answer solves."""
    data = as_dataset(problems)
    length = task.max_completion_length
    result = evaluate(
        model, tokenizer, data, task.reward, num_samples=1, temperature=0.0, max_completion_length=length
    )
    return result.pass_at_k[1]


def mean_entropy(model, tokenizer, prompts: list[str], answers: list[str]) -> float:
    """Mean entropy (nats) of the model's distribution of each token of the answers, their end included."""
    completion_ids = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(answers)["input_ids"]]
    with evaluation_mode(model):
        laws = completion_laws(
            model,
            tokenizer(prompts)["input_ids"],
            completion_ids,
            lambda logits, _: entropy(logits.float().softmax(-1)),
            batch_size=512,
        )
    return torch.cat(laws).mean().item()
