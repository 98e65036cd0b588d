"""GRPO with TRL, as its documentation shows it."""

import os

import torch
from datasets import load_dataset
from trl_selective import SelectiveGuidanceGRPOConfig as GRPOConfig, SelectiveGuidanceGRPOTrainer as GRPOTrainer

dataset = load_dataset("json", data_files=os.environ.get("DATA", "data/math_levels_3_to_5.jsonl"), split="train")
dataset = dataset.rename_column("problem", "prompt")


def names_the_solution(completions, solution, **kwargs):
    return [float(answer in completion) for completion, answer in zip(completions, solution, strict=True)]


args = GRPOConfig(
    output_dir="outputs/migration",
    preset="mentor",
    num_generations=8,
    per_device_train_batch_size=16,
    max_steps=int(os.environ.get("MAX_STEPS", "200")),
    logging_steps=1,
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
)
trainer = GRPOTrainer(
    model=os.environ.get("MODEL", "Qwen/Qwen2.5-1.5B-Instruct"),
    expert_model=os.environ.get("EXPERT", "Qwen/Qwen2.5-Math-7B-Instruct"),
    reward_funcs=names_the_solution,
    args=args,
    train_dataset=dataset,
)
trainer.train()
