"""The quickstart: its task, the models it ships, how they are made, and the whole of it in small."""

import json
import random
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training import EXPERT, POLICY, QUICKSTART, path_dataset, path_reward
from trl_selective.evaluation import evaluate

from make_models import aimless_example, expert_example, fine_tune, make_model, make_tokenizer  # isort: skip
from task import Problem, problems, random_problem, solution, step, train_and_heldout  # isort: skip

# A free row at the top; from 0 to 3 is three steps to the right, or around.
PROBLEM = Problem(walls=(14, 15, 20, 21, 26, 27, 32, 33, 34), start=0, goal=3)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("R 1 R 2 R 3", (1, 2, 3)),
        ("~ R 1 ~ R 2 R 3 ~", (1, 2, 3)),  # fillers mean nothing
        ("D 6 R 7 R 8 R 9 U 3", (6, 7, 8, 9, 3)),
        ("R 1 R 2", None),  # not there yet
        ("R 1 R 2 R 3 R 4", None),  # past it
        ("R 1 R 3", None),  # a wrong cell
        ("U 30 R 1", None),  # off the grid
        ("R 1 D 7 D 13 R 14 U 8 U 2 R 3", None),  # through a wall
        ("R 1 R 2 R", None),  # cut off
        ("", None),
        ("1 R 2 R 3 R", None),
    ],
)
def test_answers_are_verified_move_by_move(completion, expected):
    assert solution(PROBLEM, completion) == expected
    reward = path_reward([completion], [list(PROBLEM.walls)], [PROBLEM.start], [PROBLEM.goal])
    assert reward == [float(expected is not None)]


def test_edges_of_the_grid():
    assert [step(0, move) for move in "UDLR"] == [None, 6, None, 1]
    assert [step(35, move) for move in "UDLR"] == [29, None, 34, None]
    assert step(5, "R") is None  # not to the next row


def test_problems_are_solvable_and_the_held_out_ones_are_new():
    train, heldout = train_and_heldout()
    assert (len(train), len(heldout)) == (len(set(train)), len(set(heldout))) == (1024, 128)
    assert not set(train) & set(heldout)
    for problem in heldout:
        assert 4 <= problem.distances(problem.goal)[problem.start] <= 9
    assert problems(5, seed=3) == problems(5, seed=3)


def test_what_the_models_are_trained_on():
    rng = random.Random(0)
    for _ in range(50):
        prompt, answer = expert_example(rng)
        *walls, start, _, goal, _ = prompt.split()
        assert solution(Problem(tuple(map(int, walls)), int(start), int(goal)), answer)
    aimless = [aimless_example(rng) for _ in range(300)]
    hits = sum(prompt.split()[-2] == answer.split()[-1] for prompt, answer in aimless)
    assert 0.04 < hits / 300 < 0.16  # 8 in 100 by design, some by chance
    assert isinstance(random_problem(rng), Problem)


def test_shipped_models_are_small_and_as_good_as_the_readme_says():
    data = path_dataset(64)
    for folder, low, high in ((EXPERT, 0.8, 0.95), (POLICY, 0.0, 0.03)):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert sum(p.numel() for p in model.parameters()) < 170_000
        result = evaluate(model, tokenizer, data, path_reward, num_samples=4, max_completion_length=26)
        assert low <= result.pass_at_k[1] <= high


def made(steps: int):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = make_model(tokenizer)
    fine_tune(model, tokenizer, expert_example, steps=steps, learning_rate=3e-3, seed=1, description="expert")
    return model


def test_models_are_made_from_nothing():
    """The same few steps give the same model, and more steps one that has learnt something."""
    tokenizer = make_tokenizer()
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(EXPERT).get_vocab()
    assert torch.equal(made(steps=3).lm_head.weight, made(steps=3).lm_head.weight)
    prompt, answer = expert_example(random.Random(5))
    text = tokenizer(f"{prompt} {answer}", return_tensors="pt", return_token_type_ids=False)
    labels = text["input_ids"].clone()
    labels[:, : len(prompt.split())] = -100  # the answer is what is learnt
    before, after = (made(steps)(**text, labels=labels).loss.item() for steps in (1, 40))
    assert after < before - 0.3


def test_the_two_configs_differ_in_guidance_alone():
    plain, guided = (yaml.safe_load((QUICKSTART / f"{name}.yaml").read_text()) for name in ("grpo", "guided"))
    added = {key: guided[key] for key in guided.keys() - plain.keys()}
    assert {**plain, **added} == guided
    assert added == {
        "expert_model_name_or_path": "expert",
        "num_guided_generations": 4,
        "guidance_schedule": "cosine",
        "guidance_steps": 0.75,
        "entropy_quantile": 0.95,
        "guided_sampler": "stepwise",
    }


def test_the_config_with_expert_completions_differs_in_them_alone():
    plain, selected = (yaml.safe_load((QUICKSTART / f"{name}.yaml").read_text()) for name in ("grpo", "selected"))
    assert selected == {**plain, "preset": "selective", "guidance_steps": 0.75}


def test_the_whole_of_it_in_small(tmp_path):
    command = [
        sys.executable,
        str(QUICKSTART / "run.py"),
        "--max_steps",
        "3",
        "--num_samples",
        "2",
        "--output_dir",
        "out",
        "--runs",
        "grpo",
        "guided",
        "selected",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "distinct correct of 2" in result.stdout
    out = tmp_path / "out"
    summary = json.loads((out / "results.json").read_text())
    assert summary["updates"] == {"grpo": 3, "guided": 3, "selected": 3}
    assert set(summary["evaluations"]) == {"start", "grpo", "guided", "selected", "expert"}
    assert summary["evaluations"]["expert"]["pass_at_k"]["1"] > 0.7
    for name in ("grpo", "guided", "selected"):
        assert (out / name / "model.safetensors").exists()
        assert ("2510.04140" in (out / name / "README.md").read_text()) == (name != "grpo")
        assert len(list((out / name / "completions").glob("*.parquet"))) == 3
    assert (out / "training_dynamics.png").exists()
    assert (out / "pass_at_k.png").exists()
    lines = [json.loads(line) for line in (out / "heldout_completions.jsonl").open()]
    assert len(lines) == 5 * 128
    rows = [json.loads(line) for line in (out / "train_with_expert.jsonl").open()]
    assert len(rows) == 1024
    assert rows[0]["expert_sources"] == ["expert"] * len(rows[0]["expert_completions"])
