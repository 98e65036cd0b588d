"""The command line of the scripts: settings from a YAML file and from arguments, help by topic, errors without a traceback."""

import json
import re
import sys
from argparse import SUPPRESS, Action, HelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field, fields
from typing import Any

from config_file import ConfigError, ConfigFile, setting_types, suggestion
from transformers import TrainingArguments
from trl import TrlParser

from trl_selective.config import INJECTION_FIELDS, SelectiveGuidanceGRPOConfig

OURS = set(SelectiveGuidanceGRPOConfig.__annotations__)
CONFIG = Action(
    ["--config"], "config", metavar="FILE", help="YAML file with any of these settings; the command line wins."
)


def setting(help: str, default: Any = None) -> Any:
    """A field of a dataclass of settings, with its line of help."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def as_dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """A mapping, of a YAML file or as JSON of the command line."""
    return json.loads(value) if isinstance(value, str) else dict(value or {})


class HelpLines(HelpFormatter):
    """One line of help per setting, with TRL's and our defaults behind it."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=40, width=140)

    def _get_help_string(self, action):
        shows_default = action.default not in (None, SUPPRESS, []) and "(default" not in (action.help or "")
        choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
        return (action.help or "") + choices + (" (default %(default)s)" if shows_default else "")

    def _format_action_invocation(self, action):
        """`--max_steps N`; the spelling with hyphens works as well."""
        return max((option for option in action.option_strings if "-" not in option.strip("-")), key=len, default="")


class RecipeParser(TrlParser):
    """`TrlParser` that names file, line and key of what is wrong, and groups its help.

    Args:
        kinds: dataclasses of settings, by what they are about. Those of the trainer get topics of their own.
        description: of the script, a sentence.
    """

    def __init__(self, kinds: Mapping[str, type], description: str):
        self.kinds = dict(kinds)
        self._listed: dict[str, Any] = {}
        self._options: list[str] = ["--config"]
        self._given: dict[str, str] = {}  # on the command line
        self._file: ConfigFile | None = None
        super().__init__(list(kinds.values()), description=description, formatter_class=HelpLines, allow_abbrev=False)
        self._listed["config"] = CONFIG  # which TRL takes off the command line before argparse sees it

    def add_argument(self, *args, **kwargs):
        action = super().add_argument(*args, **kwargs)
        self._listed.setdefault(action.dest, action)
        self._options += action.option_strings
        return action

    # ---- Help --------------------------------------------------------------------------------------------------------------------------

    def format_help(self) -> str:
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_text(f"usage: {self.prog} [--config FILE] [--SETTING VALUE ...]")
        formatter.add_text(self.description)
        for title, names in self.topics().items():
            formatter.start_section(title)
            formatter.add_arguments([self._listed[name] for name in names])
            formatter.end_section()
        return formatter.format_help()

    def topics(self) -> dict[str, list[str]]:
        """The names of all settings by what they are about."""
        topics: dict[str, list[str]] = {}
        for topic, kind in self.kinds.items():
            names = [field.name for field in fields(kind) if field.init]
            topics |= _trainer_topics(names) if kind is SelectiveGuidanceGRPOConfig else {topic: names}
        first = next(iter(topics))
        return topics | {first: ["help", "config", *topics[first]]}

    # ---- Parsing -----------------------------------------------------------------------------------------------------------------------

    def parse_args_and_config(self, args=None, **kwargs) -> tuple[Any, ...]:
        """As TRL's, after the file was checked.

        Raises:
            SystemExit: with code 2 and one message, for whatever cannot work.
        """
        args = list(sys.argv[1:] if args is None else args)
        self._given = given_settings(args)
        with self.user_errors():
            self._check_names(args)
            if path := self._given.get("config"):
                self._file = ConfigFile(path)
                self._file.check(self.dataclass_types)
                args = ["--config", path, *_without_config(args)]
            return super().parse_args_and_config(args, **kwargs)

    def _check_names(self, arguments: Sequence[str]) -> None:
        for option in (argument.split("=")[0] for argument in arguments if argument.startswith("--")):
            if option not in self._options:
                raise ConfigError(
                    f"command line, {option}: there is no such setting.{suggestion(option, self._options)}"
                )

    # ---- Errors ------------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def user_errors(self) -> Iterator[None]:
        """Turn the errors of settings into one message and exit code 2. It is for what runs before the real work, whose errors need their
        traceback."""
        try:
            yield
        except (ValueError, FileNotFoundError) as error:
            self.error(self.explain(error))

    @contextmanager
    def clear_errors(self, *kinds: type[Exception]) -> Iterator[None]:
        """Turn errors of these kinds, whose messages say all, into that and exit code 2."""
        try:
            yield
        except kinds as error:
            self.error(str(error))

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\nAll settings: {self.prog} --help\n")

    def explain(self, error: Exception) -> str:
        """The message of an error, behind the place of the setting that it is about."""
        message, names = str(error), setting_types(self.dataclass_types)
        if isinstance(error, ConfigError):
            return message
        if isinstance(error, json.JSONDecodeError):
            message = f"expected JSON, got {error.doc!r}: {error}."
            about = [name for name in names if self._value(name) == error.doc]
        else:
            about = [name for name in re.findall(r"\w+", message) if name in names]
        placed = ((place, name) for name in about if (place := self._place(name)))
        return next((f"{place}: {message.removeprefix(f'{name}: ')}" for place, name in placed), message)

    def _value(self, name: str) -> Any:
        return self._given.get(name, self._file.values.get(name) if self._file else None)

    def _place(self, name: str) -> str | None:
        """Where a setting was made."""
        if name in self._given:
            return f"command line, --{name}"
        return self._file.where(name) if self._file and name in self._file.lines else None


def _trainer_topics(names: Sequence[str]) -> dict[str, list[str]]:
    training = {field.name for field in fields(TrainingArguments)}
    return {
        "guidance: who guides, where and how strongly": [n for n in names if n in OURS - INJECTION_FIELDS],
        "injection of expert completions": [n for n in names if n in INJECTION_FIELDS],
        "GRPO (TRL)": [n for n in names if n not in OURS | training],
        "training (Transformers)": [n for n in names if n in training],
    }


def given_settings(arguments: Sequence[str]) -> dict[str, str]:
    """What a command line sets, by name: `--name value`, `--name=value` or `--name`; of several values the first."""
    given = {}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            given[name.replace("-", "_")] = value if equals else following
    return given


def _without_config(arguments: Sequence[str]) -> list[str]:
    """The command line without `--config FILE`, in either spelling."""
    kept, is_path = [], False
    for argument in arguments:
        if not is_path and argument.split("=")[0] != "--config":
            kept.append(argument)
        is_path = argument == "--config"
    return kept
