"""What is wrong with a recipe is named with file, line and key; the help is complete and by topic."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
from trl import ModelConfig

from tests.training import QUICKSTART
from trl_selective import SelectiveGuidanceGRPOConfig
from trl_selective.config import GUIDANCE_FIELDS

RECIPES = QUICKSTART.parent
sys.path.insert(0, str(RECIPES))
from command_line import RecipeParser, given_settings  # noqa: E402
from config_file import ConfigError, ConfigFile, fits, spell  # noqa: E402
from loading import RecipeArguments  # noqa: E402
from selective_grpo import parse  # noqa: E402

KINDS = {
    "data, rewards and this script": RecipeArguments,
    "guidance": SelectiveGuidanceGRPOConfig,
    "model, adapter and quantisation (TRL)": ModelConfig,
}
CPU = "use_cpu: true\nbf16: false\n"


def message_of(tmp_path, capsys, text, *arguments):
    """What a config file ends with."""
    path = tmp_path / "recipe.yaml"
    path.write_text(CPU + text)
    with pytest.raises(SystemExit) as exit:
        parse(["--config", str(path), *arguments])
    assert exit.value.code == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("All settings: ")
    return first.replace(f"{tmp_path}/", "")


def test_the_command_line_is_named_where_it_wins(tmp_path, capsys):
    message = message_of(tmp_path, capsys, "entropy_quantile: 0.9", "--entropy_quantile=95")
    assert "error: command line, --entropy_quantile: entropy_quantile must lie in [0, 1]" in message


def test_a_file_that_is_not_there_or_no_mapping(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.yaml: the config file cannot be read, No such file"):
        ConfigFile("absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"list.yaml: expected lines of `key: value`, got list"):
        ConfigFile(str(tmp_path / "list.yaml"))


def test_values_arrive(tmp_path):
    """Numbers that YAML takes for texts included; the command line wins."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        CPU
        + "learning_rate: 1e-5\nmax_steps: 3\npreset: luffy\nlora_target_modules: [q_proj, v_proj]\nenv: {MY_ENV: one}\n"
    )
    _, script, args, model = parse([f"--config={path}", "--max_steps", "4", "--reward-funcs", "a", "b"])
    assert (args.learning_rate, args.max_steps, args.shaping_gamma) == (1e-5, 4, 0.1)
    assert (script.reward_funcs, model.lora_target_modules) == (["a", "b"], ["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, float, True), ("1e-3", float, True), ("x", float, False), (1, int, True), ("1", int, True), (1.0, int, False),
        (None, int | None, True), (None, int, False), (True, bool, True), ("yes", bool, False), (1, str, False),
        ({"a": 1}, dict | str | None, True), ([1], list[int], True), (["a"], list[int], False),
    ],
)  # fmt: skip
def test_types(value, annotation, expected):
    assert fits(value, annotation) is expected


def test_annotations_in_words():
    assert spell(int | None) == "a whole number or null"
    assert spell(dict | str | None) == "a mapping or a text or null"


def test_given_settings():
    assert given_settings(["--a-b", "1", "--c=2", "--d", "--e", "x", "y"]) == {
        "a_b": "1",
        "c": "2",
        "d": "--e",
        "e": "x",
    }


def test_scripts_that_do_not_train_load_no_trainer():
    script = (
        "import sys, collect_expert_completions, evaluate, prepare_data; print('trl_selective.trainer' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=RECIPES, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_the_help_is_complete_and_by_topic():
    parser = RecipeParser(KINDS, "Train.")
    names = [name for names in parser.topics().values() for name in names]
    fields = [field.name for kind in KINDS.values() for field in dataclasses.fields(kind) if field.init]
    assert sorted(names) == sorted(["help", "config", *fields])  # each once

    sections = dict(re.findall(r"^(\w[^\n]*):\n((?:  [^\n]*\n)+)", parser.format_help(), re.MULTILINE))
    assert list(sections) == list(parser.topics())
    assert "--preset " in sections["guidance: who guides, where and how strongly"]
    assert "One of entropy" not in sections["injection of expert completions"]
    assert "--beta " in sections["GRPO (TRL)"]
    assert "--learning_rate " in sections["training (Transformers)"]
    assert "--lora_r " in sections["model, adapter and quantisation (TRL)"]


def test_our_settings_have_one_sentence_of_help():
    for field in dataclasses.fields(SelectiveGuidanceGRPOConfig):
        if field.name in GUIDANCE_FIELDS | {"preset"}:
            assert re.fullmatch(r"(?!.*\. [A-Z]).+\.", field.metadata["help"]), field.name
