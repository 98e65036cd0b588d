"""Evaluation: what it counts, and what it leaves alone."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import tiny_adapter
from tests.training import EXPERT, POLICY, path_dataset, path_reward
from trl_selective.evaluation import evaluate
from trl_selective.functional import pass_at_k


@pytest.fixture(scope="module")
def expert():
    return AutoModelForCausalLM.from_pretrained(EXPERT), AutoTokenizer.from_pretrained(EXPERT)


def run(expert, **changes):
    settings = {
        "dataset": path_dataset(12),
        "reward_func": path_reward,
        "num_samples": 4,
        "ks": (1, 2, 4),
        "max_completion_length": 26,
    }
    return evaluate(*expert, **{**settings, **changes})


def test_numbers_follow_from_the_samples(expert):
    """Recomputed from what was sampled, with another grouping of the generation into batches."""
    result = run(expert, batch_size=7)
    dataset = path_dataset(12)
    correct = [
        [bool(path_reward([text], [row["walls"]], [row["start"]], [row["goal"]])[0]) for text in texts]
        for row, texts in zip(dataset, result.completions, strict=True)
    ]
    assert correct == result.is_correct
    counts = torch.tensor([sum(row) for row in correct])
    assert 0.6 < counts.sum() / 48 <= 1  # the expert's success
    for k in (1, 2, 4):
        estimates = pass_at_k(4, counts, k)
        assert result.pass_at_k[k] == pytest.approx(estimates.mean().item())
        assert result.standard_error[k] == pytest.approx((estimates.std() / 12**0.5).item())
    assert result.pass_at_k[1] <= result.pass_at_k[2] <= result.pass_at_k[4]
    pairs = zip(result.completions, result.is_correct, strict=True)
    distinct = [len({t for t, ok in zip(texts, oks, strict=True) if ok}) for texts, oks in pairs]
    assert result.distinct_correct == pytest.approx(sum(distinct) / 12)
    assert (result.num_problems, result.num_samples) == (12, 4)
    assert set(result.to_dict()) == {"pass_at_k", "standard_error", "distinct_correct", "num_problems", "num_samples"}


def test_at_temperature_0_all_samples_are_the_greedy_one(expert):
    greedy = run(expert, temperature=0.0)
    assert all(len(set(texts)) == 1 for texts in greedy.completions)
    assert greedy.completions == run(expert, temperature=0.0, seed=5).completions
    assert greedy.pass_at_k[1] == greedy.pass_at_k[4]


def test_equal_keys_are_the_same_solution(expert):
    result = run(expert, answer_key=lambda text: "any")
    assert result.distinct_correct == sum(any(row) for row in result.is_correct) / 12


def test_it_is_repeatable_and_leaves_mode_and_random_numbers_alone(expert):
    model, _ = expert
    model.train()
    state = torch.get_rng_state()
    first, second, other = run(expert, seed=1), run(expert, seed=1), run(expert, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert first.completions == second.completions != other.completions


def test_the_mode_is_restored_after_an_error(expert):
    model, _ = expert
    model.train()
    with pytest.raises(KeyError):
        run(expert, reward_func=lambda completions, **columns: columns["absent"])
    assert model.training


def test_columns_reach_the_reward_and_none_is_wrong(expert):
    seen = {}

    def reward(completions, prompts, walls, **kwargs):
        seen.update(prompts=prompts, walls=walls, completions=completions)
        return [None] * len(completions)

    result = run(expert, reward_func=reward, dataset=path_dataset(2), num_samples=3, ks=(1,))
    assert result.pass_at_k == {1: 0.0}
    assert len(seen["prompts"]) == len(seen["walls"]) == len(seen["completions"]) == 6
    assert seen["prompts"][:3] == [path_dataset(2)[0]["prompt"]] * 3


def test_the_models_own_penalties_do_not_count():
    """Many a model on the Hub ships with a repetition penalty, which training does not use."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(POLICY), AutoTokenizer.from_pretrained(POLICY)
    plain = run((model, tokenizer))
    own = {"repetition_penalty": 1.8, "min_p": 0.3, "typical_p": 0.5, "top_k": 3, "top_p": 0.5, "epsilon_cutoff": 0.3,
           "no_repeat_ngram_size": 1, "suppress_tokens": [5], "min_new_tokens": 20, "return_dict_in_generate": True}  # fmt: skip
    model.generation_config.update(**own)
    assert run((model, tokenizer)).completions == plain.completions
    assert {name: getattr(model.generation_config, name) for name in own} == own


def test_a_tokenizer_without_padding_is_refused(expert):
    model, _ = expert
    tokenizer = AutoTokenizer.from_pretrained(EXPERT)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"Batches need a padding token .* Set the tokenizer's `pad_token`"):
        run((model, tokenizer))


def test_an_adapter_keeps_its_own_settings():
    adapter, tokenizer = tiny_adapter(1, vocab_size=45), AutoTokenizer.from_pretrained(POLICY)
    plain = run((adapter, tokenizer))
    adapter.generation_config.suppress_tokens = [5]
    assert run((adapter, tokenizer)).completions == plain.completions
    assert adapter.generation_config.suppress_tokens == [5]
    assert adapter.get_base_model().generation_config.suppress_tokens == [5]


def test_each_part_of_the_model_keeps_its_mode(expert):
    model, _ = expert
    model.train()
    model.model.norm.eval()
    run(expert, dataset=path_dataset(1))
    assert model.training
    assert not model.model.norm.training


def test_a_single_problem_has_no_standard_error(expert):
    result = run(expert, dataset=path_dataset(1))
    assert math.isnan(result.standard_error[1])
    assert 0 <= result.pass_at_k[1] <= 1


def test_conversations_go_through_the_chat_template():
    """The template writes the user's words alone, so that a conversation is the plain prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(POLICY), AutoTokenizer.from_pretrained(POLICY)
    plain = Dataset.from_dict({"prompt": [row["prompt"] for row in path_dataset(3)]})
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    chat = Dataset.from_dict({"prompt": [[{"role": "user", "content": prompt}] for prompt in plain["prompt"]]})
    shapes = []

    def reward(completions, **kwargs):
        shapes.append(completions[0])
        return [1.0] * len(completions)

    settings = {"num_samples": 2, "max_completion_length": 6}
    texts = [evaluate(model, tokenizer, data, reward, **settings).completions for data in (plain, chat)]
    assert texts[0] == texts[1]
    assert isinstance(shapes[0], str)
    assert shapes[1][0]["role"] == "assistant"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ks": (1, 8)}, r"pass@k needs 1 <= k <= num_samples = 4, got \[1, 8\]. Draw more samples"),
        ({"ks": (0,)}, "pass@k needs 1 <= k"),
        ({"ks": ()}, "pass@k needs 1 <= k"),
        (
            {"dataset": Dataset.from_dict({"question": ["?"]})},
            r"with a column 'prompt', got 1 rows with columns \['question'\]",
        ),
        ({"dataset": Dataset.from_dict({"prompt": []})}, "got 0 rows"),
        ({"batch_size": 0}, "at least one row, got .* batch_size=0"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(expert, changes, message):
    with pytest.raises(ValueError, match=message):
        run(expert, **changes)
