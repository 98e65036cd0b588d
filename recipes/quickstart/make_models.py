"""Makes the two tiny models of the quickstart from nothing: `expert/` and `policy/` beside this file. About ten minutes on two cores.

    python recipes/quickstart/make_models.py

* The **expert** learns to walk shortest paths, with a filler word before one move in five: strong, and redundant in style.
* The **policy** is the expert after 300 more steps on aimless walks, most of which do not end at the goal: it still knows how a move
  changes the cell, but hardly ever reaches the goal. Like a pre-trained language model, it holds the skill without using it. Say so when
  you quote the quickstart's figures: a start of this kind favours every method that learns from the expert.
"""

import math
import random
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import torch
from task import FILLER, MAX_COMPLETION_TOKENS, WORDS, Problem, problems, random_problem, solution, train_and_heldout
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
PAD, EOS = "<pad>", "<eos>"


def make_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token per word of the task, and `<pad>` and `<eos>`."""
    vocabulary = {word: index for index, word in enumerate([PAD, EOS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left")


def make_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 64, num_hidden_layers: int = 3, num_attention_heads: int = 2
) -> LlamaForCausalLM:
    """A Llama, of 165 thousand parameters if nothing else is said."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def shortest_path(problem: Problem, rng: random.Random) -> str:
    """A random shortest path, with a filler before one move in five."""
    distance, cell, words = problem.distances(problem.goal), problem.start, []
    while cell != problem.goal:
        move, cell = rng.choice([(m, to) for m, to in problem.neighbours(cell) if distance[to] < distance[cell]])
        words += [FILLER] * (rng.random() < 0.2 and words.count(FILLER) < 5) + [move, str(cell)]
    return " ".join(words)


def expert_example(rng: random.Random) -> tuple[str, str]:
    problem = random_problem(rng)
    return problem.prompt, shortest_path(problem, rng)


def aimless_example(rng: random.Random) -> tuple[str, str]:
    """A random walk of 3 to 8 moves. In 8 of 100 the goal is set where the walk happened to end."""
    problem, words = random_problem(rng), []
    cell = problem.start
    for _ in range(rng.randint(3, 8)):
        move, cell = rng.choice(problem.neighbours(cell))
        words += [move, str(cell)]
    if rng.random() < 0.08 and cell != problem.start:
        problem = Problem(problem.walls, problem.start, cell)
    return problem.prompt, " ".join(words)


def fine_tune(model, tokenizer, example, *, steps: int, learning_rate: float, seed: int, description: str) -> None:
    """Next-token training on fresh examples, on the answers only: batches of 128, AdamW, cosine decay."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 20) * 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    tokenizer.padding_side = "right"
    model.train()
    for _ in (progress := trange(steps, desc=description)):
        prompts, answers = zip(*(example(rng) for _ in range(128)), strict=True)
        texts = [f"{prompt} {answer} {EOS}" for prompt, answer in zip(prompts, answers, strict=True)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : len(prompts[0].split())] = -100  # every prompt has the same number of words
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    tokenizer.padding_side = "left"


@torch.no_grad()
def success_rate(model, tokenizer, tasks: list[Problem]) -> float:
    """Share of `tasks` that one sampled answer solves."""
    batch = tokenizer([task.prompt for task in tasks], return_tensors="pt", padding=True, return_token_type_ids=False)
    output = model.eval().generate(**batch, do_sample=True, top_k=0, max_new_tokens=MAX_COMPLETION_TOKENS)
    answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(solution(task, answer) is not None for task, answer in zip(tasks, answers, strict=True)) / len(tasks)


def save(model, tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    ArgumentParser(description="Make the models of the quickstart anew, in place of the shipped ones.").parse_args()
    torch.manual_seed(0)
    train, heldout = train_and_heldout()
    check = problems(512, seed=99, exclude=frozenset(train + heldout))  # neither trained on nor reported
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    fine_tune(model, tokenizer, expert_example, steps=3000, learning_rate=3e-3, seed=1, description="expert")
    print(f"expert: {success_rate(model, tokenizer, check):.1%} of the answers are right")
    save(model, tokenizer, HERE / "expert")
    fine_tune(model, tokenizer, aimless_example, steps=300, learning_rate=1e-3, seed=2, description="policy")
    print(f"policy: {success_rate(model, tokenizer, check):.1%} of the answers are right")
    save(model, tokenizer, HERE / "policy")


if __name__ == "__main__":
    main()
