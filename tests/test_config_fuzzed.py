"""Any value of any setting, in Python, YAML or on the command line: it is taken, or refused with a message."""

import contextlib
import io
import tempfile
import warnings
from pathlib import Path

import yaml
from hypothesis import strategies as st
from trl import TrlParser

from tests.properties import for_all
from trl_selective import SelectiveGuidanceGRPOConfig
from trl_selective import config as module
from trl_selective.config import GUIDANCE_FIELDS

NAMES = [
    *(name for name in vars(module).values() if isinstance(name, tuple) for name in name),
    *("mentor", "luffy", "selective", "group_failed & below", "below |", "a & b", "", "nan", "1e3", "-1", "none"),
]
numbers = st.one_of(
    st.integers(-2, 40),
    st.floats(),
    st.sampled_from([0, 0.5, 1, 8, 10**30, -(10**30), float("inf"), float("nan"), 1e-320]),
)
values = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    st.sampled_from(NAMES),
    st.text(max_size=6),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)
fields = st.sampled_from(sorted({*GUIDANCE_FIELDS, "preset"}))
settings = st.dictionaries(fields, values, max_size=4)
modes = st.sampled_from(
    [{}, {"num_guided_generations": 2}, {"num_injected_completions": 1}, {"preset": "mentor"}, {"preset": "selective"}]
)
BASE = {"bf16": False, "num_generations": 8, "per_device_train_batch_size": 8}


def assert_makes_or_refuses(make, *refusals) -> None:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()) as printed:
        warnings.simplefilter("ignore")
        config, message = None, ""
        try:
            config = make()
        except ValueError as refusal:
            message = str(refusal)
        except refusals:
            message = printed.getvalue()
    if config is None:
        assert len(message) > 10
        return
    for schedule in (config.guidance_coef_schedule(10), config.injection_probability_by_step(10)):
        assert all(schedule(step) >= 0 for step in (0, 5, 10, 11))


@for_all(examples=150, mode=modes, changes=settings)
def test_any_setting_in_python(mode, changes):
    assert_makes_or_refuses(lambda: SelectiveGuidanceGRPOConfig("out", **{**BASE, **mode, **changes}))


def parsed(arguments: list[str]) -> SelectiveGuidanceGRPOConfig:
    return TrlParser(SelectiveGuidanceGRPOConfig).parse_args_and_config(arguments)[0]


@for_all(examples=40, mode=modes, changes=settings, more=settings)
def test_any_setting_in_a_file_and_on_the_command_line(mode, changes, more):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump({"output_dir": "out", **BASE, **mode, **changes}))
        arguments = ["--config", str(path)]
        for name, value in more.items():
            arguments += [f"--{name}", str(value)]
        assert_makes_or_refuses(lambda: parsed(arguments), SystemExit)
