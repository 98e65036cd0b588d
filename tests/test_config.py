"""What the config accepts and fills in. What it refuses and warns about stands in the table of tests/bad_input/."""

import json
import warnings
from dataclasses import dataclass

import pytest
from transformers import BitsAndBytesConfig
from trl import GRPOConfig, TrlParser

from tests.bad_input.settings import IDLE_OF_GUIDANCE, IDLE_OF_INJECTION
from trl_selective import SelectiveGuidanceGRPOConfig
from trl_selective.config import DEFAULTS, GUIDANCE_FIELDS
from trl_selective.presets import PRESETS

GUIDED = {"num_generations": 8, "num_guided_generations": 4, "per_device_train_batch_size": 8, "bf16": False}
INJECTED = {"num_generations": 8, "num_injected_completions": 2, "per_device_train_batch_size": 8, "bf16": False}
NAN, INF = float("nan"), float("inf")


def config(**settings):
    return SelectiveGuidanceGRPOConfig("out", **{"bf16": False, **settings})


def test_the_default_is_plain_grpo():
    ours, theirs = config(), GRPOConfig("out", bf16=False)
    assert ours.num_guided_generations == 0
    differing = {name for name in vars(theirs) if getattr(ours, name) != getattr(theirs, name)}
    assert differing <= {"logging_dir", "distributed_state"}


def test_every_default_is_a_field_and_stays_the_default():
    assert set(DEFAULTS) <= GUIDANCE_FIELDS
    unset = config()
    for name in GUIDANCE_FIELDS:
        assert getattr(unset, name) == DEFAULTS.get(name)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_what_is_unset_and_nothing_else(preset):
    filled = config(
        preset=preset, **{k: v for k, v in GUIDED.items() if k != "num_guided_generations" and k != "bf16"}
    )
    for name, value in PRESETS[preset].items():
        assert getattr(filled, name) == value


def test_an_explicit_setting_beats_the_preset_even_where_it_equals_the_default():
    settings = config(preset="mentor_as_released", entropy_threshold_floor=0.0, num_generations=8)
    assert settings.entropy_threshold_floor == 0.0  # the preset says 1.5
    assert settings.entropy_threshold_init == 999.0


def test_yaml_and_command_line_reach_the_fields(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "output_dir: out\nbf16: false\npreset: mentor_corrected\nnum_generations: 8\nguidance_steps: 0.5\n"
        "expert_model_init_kwargs: {dtype: float32}\n"
    )
    arguments = ["--config", str(tmp_path / "run.yaml"), "--guidance_weight_max", "0.8", "--entropy_quantile", "0.9"]
    (parsed,) = TrlParser(SelectiveGuidanceGRPOConfig).parse_args_and_config(arguments)
    assert parsed.guided_importance_correction == "token_truncate"
    assert (parsed.guidance_weight_max, parsed.entropy_quantile, parsed.guidance_steps) == (0.8, 0.9, 0.5)
    assert parsed.expert_model_init_kwargs == {"dtype": "float32"}
    assert parsed.num_guided_generations == 4


def test_injection_on_the_command_line():
    given = {
        "output_dir": "out",
        "bf16": "false",
        "preset": "selective",
        "num_injected_completions": "2",
        "max_injected_per_batch": "4",
        "overlong_expert_completions": "truncate",
        "injection_trigger": "group_failed & with_probability",
        "injection_probability": "0.5",
        "injection_selector": "learned|shortest",
    }
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    (parsed,) = TrlParser(SelectiveGuidanceGRPOConfig).parse_args_and_config(arguments)
    assert parsed.injection_trigger == "group_failed & with_probability"
    assert parsed.injection_selector == "learned|shortest"
    assert (parsed.num_injected_completions, parsed.max_injected_per_batch) == (2, 4)
    assert (parsed.injection_probability, parsed.overlong_expert_completions) == (0.5, "truncate")
    assert parsed.injection_correction == "policy_shaping"  # of the preset


@pytest.mark.parametrize(
    "settings",
    [{**GUIDED, "guidance_weight_max": 0.7}, {**INJECTED, "preset": "luffy", "injection_selector": "novel"}],
)
def test_a_config_survives_its_own_serialisation(settings):
    first = config(**settings)
    kept = {name: value for name, value in first.to_dict().items() if name in GUIDANCE_FIELDS | {"preset"}}
    again = config(**{**settings, **kept})
    assert all(getattr(again, name) == getattr(first, name) for name in GUIDANCE_FIELDS)


def test_trackers_are_told_of_quantisation():
    """Which Transformers does for the policy's arguments alone."""
    quantised = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "device_map": "auto"}
    args = config(**GUIDED, expert_model_init_kwargs=quantised, model_init_kwargs=dict(quantised))
    told = json.loads(args.to_json_string())
    for name in ("expert_model_init_kwargs", "model_init_kwargs"):
        assert told[name]["quantization_config"]["load_in_4bit"] is True
        assert told[name]["device_map"] == "auto"
    assert args.expert_model_init_kwargs["quantization_config"] is quantised["quantization_config"]


def test_luffy_as_published():
    """One expert trajectory in each group of 8, whatever the group has found; f(x) = x / (x + 0.1); for the whole of training."""
    luffy = config(preset="luffy")
    assert (luffy.num_generations, luffy.num_injected_completions, luffy.max_injected_per_batch) == (8, 1, None)
    assert (luffy.injection_trigger, luffy.injection_selector, luffy.injection_replaces) == ("always", "first", "last")
    assert (luffy.injection_advantage, luffy.injection_correction, luffy.shaping_gamma) == (
        "group",
        "policy_shaping",
        0.1,
    )
    assert {luffy.guidance_coef_schedule(200)(step) for step in (0, 100, 199, 10**6)} == {1.0}
    assert luffy.num_guided_generations == 0


def test_selective_injects_where_a_group_failed_and_less_and_less():
    selective = config(preset="selective")
    assert (selective.injection_trigger, selective.injection_advantage) == ("group_failed", "positive_excess")
    alpha = selective.guidance_coef_schedule(max_steps=200)
    assert [round(alpha(step), 4) for step in (0, 60, 120)] == [1.0, 0.5, 0.0]


def test_a_setting_beats_the_presets_of_injection():
    settings = config(preset="luffy", injection_trigger="below", injection_threshold=0.5, guidance_steps=10)
    assert (settings.injection_trigger, settings.injection_threshold, settings.guidance_steps) == ("below", 0.5, 10)
    assert settings.injection_advantage == "group"


# ---- alpha -----------------------------------------------------------------------------------------------------------------------------


def test_the_papers_alpha_is_a_cosine_over_120_of_200_steps():
    alpha = config(**GUIDED, preset="mentor").guidance_coef_schedule(max_steps=200)
    # 0.6 of 200 steps are 120; half-way, (1 + cos(pi / 2)) / 2 = 0.5; a quarter in, (1 + cos(pi / 4)) / 2 = 0.8536
    assert [round(alpha(step), 4) for step in (0, 30, 60, 120, 199)] == [1.0, 0.8536, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"guidance_schedule": "linear", "guidance_steps": 10}, [2.0, 1.0, 0.0, 0.0]),
        ({"guidance_schedule": "constant", "guidance_steps": 10}, [2.0, 2.0, 0.0, 0.0]),
        ({"guidance_schedule": "constant", "guidance_steps": 0.5}, [2.0, 2.0, 0.0, 0.0]),
        ({"guidance_schedule": "cosine", "guidance_steps": 0}, [0.0, 0.0, 0.0, 0.0]),
        *(
            ({"guidance_schedule": name, "guidance_steps": float("inf")}, [2.0] * 4)
            for name in ("cosine", "linear", "constant")
        ),
    ],
)
def test_schedules_of_alpha(settings, expected):
    alpha = config(**GUIDED, guidance_coef=2.0, **settings).guidance_coef_schedule(max_steps=20)
    assert [alpha(step) for step in (0, 5, 10, 19)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.8, 0.8, 0.0, 0.0]),  # constant until guidance_steps
        ({"injection_probability_schedule": "linear"}, [0.8, 0.4, 0.0, 0.0]),
        ({"injection_probability_schedule": "cosine"}, [0.8, 0.4, 0.0, 0.0]),
        ({"injection_probability_schedule": "linear", "guidance_steps": INF}, [0.8] * 4),
        ({"injection_probability_schedule": "constant", "guidance_schedule": "linear"}, [0.8, 0.8, 0.0, 0.0]),
    ],
)
def test_schedules_of_the_injection_probability(settings, expected):
    settings = {
        "injection_trigger": "with_probability",
        "injection_probability": 0.8,
        "guidance_steps": 10,
        **settings,
    }
    probability = config(**INJECTED, **settings).injection_probability_by_step(max_steps=20)
    assert [probability(step) for step in (0, 5, 10, 19)] == pytest.approx(expected)


# ---- What is accepted -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.9, "top_k": 50, "min_p": 0.1, "repetition_penalty": 1.1},
        {"use_vllm": True},
        {"generation_kwargs": {"num_beams": 2}},
        {"num_injected_completions": 6},
        *(
            {"importance_sampling_level": "sequence", "injection_correction": correction}
            for correction in ("sequence_policy_shaping", "sequence_truncated", "none")
        ),
        {"injection_threshold": -2.0, "injection_trigger": "below"},
        {"injection_selector": "reward_gain & learnable | novel | first"},
    ],
)
def test_what_injection_alone_can_work_with(settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*without effect.*")
        accepted = config(**{**INJECTED, **settings})
    assert all(getattr(accepted, name) == value for name, value in settings.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.9},
        {"use_vllm": True},
        {"num_generations": 2},
        {"remove_unused_columns": True},
        {"importance_sampling_level": "sequence"},
    ],
)
def test_without_guidance_nothing_of_it_is_refused(settings):
    config(**settings)


def test_without_guidance_a_group_may_be_split_over_processes(monkeypatch):
    monkeypatch.setattr(SelectiveGuidanceGRPOConfig, "world_size", 2)
    config(num_generations=8, per_device_train_batch_size=4)  # 2 * 4 rows are one group of 8


@pytest.mark.parametrize(
    "settings",
    [
        {"vllm_mode": "colocate"},
        {"vllm_mode": "colocate", "guided_sampler": "coin", "guided_importance_correction": "token_truncate"},
        {"vllm_mode": "server", "vllm_tensor_parallel_size": 2, "first_token_from_expert": True},
    ],
)
def test_what_guidance_with_vllm_can_work_with(settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*without effect.*")
        assert config(**{**GUIDED, "use_vllm": True, **settings}).use_vllm


# ---- Warnings --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "settings"),
    [(GUIDED, given) for given, _ in IDLE_OF_GUIDANCE] + [(INJECTED, given) for given, _ in IDLE_OF_INJECTION],
)
def test_a_setting_without_effect_warns_once(base, settings):
    """What is said stands in the table."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config(**{**base, **settings})
    assert sum("without effect" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {**GUIDED, "guidance_steps": 10, "guided_sampler": "speculative", "draft_length": 4},
        {
            **INJECTED,
            "guidance_steps": 10,
            "guidance_coef": 0.5,
            "reward_range": 2.0,
            "max_injected_per_batch": 3,
            "injection_trigger": "below & with_probability",
            "injection_threshold": 0.5,
            "injection_probability": 0.5,
            "injection_probability_schedule": "linear",
            "injection_correction": "truncated",
            "importance_ratio_max": 2.0,
            "expert_logprobs_column": "logps",
        },
        {**INJECTED, "shaping_gamma": 0.2, "injection_correction": "sequence_policy_shaping"},
        {**GUIDED, "num_injected_completions": 1, "entropy_quantile": 0.9, "shaping_gamma": 0.2},
        # a preset's settings are not the user's
        {"preset": "luffy"},
        {"preset": "selective", "injection_correction": "none"},
    ],
)
def test_settings_with_effect_do_not_warn(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(**settings)


# ---- An expert behind a server -------------------------------------------------------------------------------------------------------------

SERVER = {**GUIDED, "expert_model_server_url": "http://localhost:8000/v1"}


def test_an_expert_behind_a_server():
    args = config(**SERVER)
    assert (args.expert_model_server_patience, args.guided_sampler) == (600.0, "auto")
    assert config(**SERVER, guided_importance_correction="token_truncate").temperature == 1.0
    assert config(**SERVER, guided_sampler="coin", temperature=0.7).temperature == 0.7


def test_what_is_in_effect_is_the_same_for_a_config_that_adds_settings():
    @dataclass
    class Larger(SelectiveGuidanceGRPOConfig):
        extra: int = 0

    settings = {**GUIDED, "preset": "mentor_corrected"}
    assert Larger("out", **settings).in_effect() == config(**settings).in_effect()
    assert config(**settings).in_effect()["guidance_weight_max"] == 0.9


@pytest.mark.parametrize(("first_token_from_expert", "warns"), [(False, False), (True, True)])
def test_a_cap_bounds_no_ratio_of_a_token_that_is_the_experts_alone(first_token_from_expert, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config(**GUIDED, preset="mentor_corrected", first_token_from_expert=first_token_from_expert)
    assert any("truncates nothing" in str(warning.message) for warning in caught) == warns
