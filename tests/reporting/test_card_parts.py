"""What cards are put together from: words for every setting, figures with their arithmetic, names that may be told."""

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.training import POLICY
from trl_selective import SelectiveGuidanceGRPOConfig, sampling
from trl_selective.config import CORRECTIONS, INJECTION_CORRECTIONS
from trl_selective.engines.sampler import VllmCoinSampler
from trl_selective.experts import ExpertServer
from trl_selective.reporting.card import describe
from trl_selective.reporting.card_method import (
    ADVANTAGES,
    GUIDED_CORRECTIONS,
    INJECTED_CORRECTIONS,
    SAMPLERS,
    WEIGHTS,
    equations,
    fall,
    settings,
)
from trl_selective.reporting.card_training import statistics, summary
from trl_selective.reporting.markdown import insert_before, table
from trl_selective.reporting.names import hub_id, shown_name
from trl_selective.sampling import WEIGHTINGS


def config(**changes) -> SelectiveGuidanceGRPOConfig:
    return SelectiveGuidanceGRPOConfig("out", use_cpu=True, bf16=False, **{"num_guided_generations": 4, **changes})


def test_there_are_words_for_every_choice():
    assert set(WEIGHTS) == set(WEIGHTINGS)
    assert set(GUIDED_CORRECTIONS) == set(CORRECTIONS)
    assert set(INJECTED_CORRECTIONS) == set(INJECTION_CORRECTIONS)
    assert set(ADVANTAGES) == {"group", "batch", "none"}  # TRL's scale_rewards
    assert set(SAMPLERS) - {"VllmCoinSampler"} == {name for name in sampling.__all__ if name.endswith("Sampler")} - {
        "GuidedSampler"
    }
    assert VllmCoinSampler.__name__ in SAMPLERS


def test_experts_are_told_by_what_they_are():
    """Of a server neither its address nor a local name; of a shared base that it is the policy's."""
    own = config()
    model = AutoModelForCausalLM.from_pretrained(POLICY)
    number = sum(parameter.numel() for parameter in model.parameters())
    assert describe(model, own) == f"a model that is not on the Hub (`LlamaForCausalLM`, {number:,} parameters)"
    shared = config(expert_model_shares_base=True)
    assert describe(model, shared) == "the policy's own base model, without the adapter"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert describe(adapted, shared) == "an adapter on the policy's own base model"
    url = "http://10.0.0.1:8000/v1"
    behind = config(expert_model_server_url=url, expert_model_name_or_path="lab/expert")
    server = ExpertServer(url, "lab/expert", vocab_size=9, eos_token_ids=[1])
    link = "[lab/expert](https://huggingface.co/lab/expert)"
    assert describe(server, behind) == f"{link}, behind a completions endpoint"
    server.name = POLICY
    assert describe(server, behind) == "a model that is not on the Hub, behind a completions endpoint"
    assert "10.0.0.1" not in settings(behind) + equations(behind, "RemoteCoinSampler", None, None)
    assert describe(None, own) == ""


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"guidance_weighting": "hard_gate", "guidance_weight_max": 0.7}, "| `w = 0.7` where `H >= gamma`, else 0, `H` the"),
        ({"guidance_weighting": "constant", "guidance_weight_max": 0.5}, "| share of the expert | `w = 0.5` | trl-selective |"),
        ({"preset": "mentor_as_released"}, "| `(1 - w) * initial policy + w * expert` | MENTOR, Eq. 6 |"),
        ({"guided_importance_correction": "sequence_mask", "importance_ratio_max": 5}, "over the completion, 0 where `r > 5` | trl-selective |"),
        ({"scale_rewards": "batch"}, "`std` over those of the batch | TRL, `scale_rewards` |"),
        ({"scale_rewards": "none"}, "| `R - mean`, `mean` over the on-policy rollouts of its group | TRL, `scale_rewards` |"),
    ],
)  # fmt: skip
def test_equations_follow_the_settings(changes, line):
    assert line in equations(config(**changes), "CoinSampler", None, None)


@pytest.mark.parametrize(
    ("schedule", "steps", "words"),
    [
        ("linear", 120, "linear from 1 to 0 over 120 steps; then nothing"),
        ("cosine", 0.6, "cosine from 1 to 0 over 60 % of all steps; then nothing"),
        ("constant", 0.25, "1 for 25 % of all steps; then nothing"),
        ("constant", float("inf"), "1 throughout"),
    ],
)
def test_schedules_in_words(schedule, steps, words):
    assert fall(schedule, 1.0, steps).startswith(words)


def test_settings_are_those_that_differ():
    text = settings(config(entropy_quantile=0.9, guidance_weight_max=1.0, expert_model_name_or_path="/home/me/expert"))
    assert text.splitlines()[4:] == [
        "| `num_guided_generations` | `4` | `0` |",
        "| `entropy_quantile` | `0.9` | `0.95` |",
    ]


def test_start_end_and_mean():
    """Of 20 values a tenth are two: (1 + 2) / 2, (19 + 20) / 2, 210 / 20. Of three, a tenth is one."""
    assert summary(range(1, 21), "{:g}".format) == ["1.5", "19.5", "10.5"]
    assert summary([3, 5, 4], "{:g}".format) == ["3", "4", "4"]


def test_figures_leave_out_what_was_not_logged():
    """The closing summary of the run is no step."""
    history = [
        {
            "reward": 0.2,
            "guidance/coef": 1.0,
            "guidance/rows": 0.5,
            "guidance/weight": 0.5,
            "guidance/reward/guided": None,
        },
        {"reward": 0.4, "guidance/coef": 0.0, "guidance/rows": 0.0},
        {"train_runtime": 5.0, "reward": 99.0},
    ]
    assert statistics(history).splitlines()[2:] == [
        "| rollouts that were guided | 50.0% | 0.0% | 25.0% |",
        "| reward of the policy | 0.2 | 0.4 | 0.3 |",
        "| `alpha` | 1 | 0 | 0.5 |",
        "| `w`, mean over guided tokens | 0.50 | 0.50 | 0.50 |",
    ]
    assert statistics([]) is None


def test_only_names_of_the_hub_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "expert").mkdir(parents=True)
    assert hub_id("open-r1/OpenR1-Qwen-7B") == "open-r1/OpenR1-Qwen-7B"
    assert hub_id("gpt2") == "gpt2"
    for name in (
        "models/expert",
        str(tmp_path),
        "/gone/expert",
        "./expert",
        "a/b/c",
        "~/expert",
        "held.jsonl",
        "a/b.csv",
        "",
        None,
    ):
        assert hub_id(name) is None


def test_of_a_place_here_the_last_part_is_told(tmp_path, monkeypatch):
    (tmp_path / "models" / "expert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "models" / "expert")
    assert [shown_name(name) for name in (".", "../expert/", str(tmp_path / "models"))] == [
        "expert",
        "expert",
        "models",
    ]
    assert shown_name("open-r1/OpenR1-Qwen-7B") == "open-r1/OpenR1-Qwen-7B"


def test_markdown():
    assert table(["a", "b"], [("1 | 2", "3")]) == "| a | b |\n| --- | --- |\n| 1 \\| 2 | 3 |"
    assert insert_before("# T\n\none\n\n## End\n\nlast\n", "## End", "new") == "# T\n\none\n\nnew\n\n## End\n\nlast\n"
    assert insert_before("# T\n\none\n", "## End", "new") == "# T\n\none\n\nnew\n"
