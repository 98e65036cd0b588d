"""Reads a recipe's YAML file and says where in it something is wrong: file, line, key, and the way out.

PyYAML alone takes the last of two equal keys, `no` for False and `1e-6` for a text; argparse checks no type of a value from a file. Here
each value is checked against the annotation of the setting that it is for.
"""

import difflib
from collections.abc import Collection
from dataclasses import fields
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


class ConfigError(ValueError):
    """A config file that cannot be used. The message names file, line and key."""


class ConfigFile:
    """The top level of a YAML file, with the line of each key.

    Attributes:
        path: of the file.
        values: of the keys.
        lines: of the keys, from 1.

    Raises:
        ConfigError: if it cannot be read, is no mapping of texts, or has a key twice.
    """

    def __init__(self, path: str):
        self.path = path
        self.values: dict[str, Any] = {}
        self.lines: dict[str, int] = {}
        try:
            text = Path(path).read_text(encoding="utf-8")
            root = yaml.compose(text, yaml.SafeLoader)
            loaded = yaml.safe_load(text)
        except OSError as error:
            raise ConfigError(f"{path}: the config file cannot be read, {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise ConfigError(f"{path}{line}: no valid YAML, {getattr(error, 'problem', None) or error}.") from error
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: expected lines of `key: value`, got {type(loaded).__name__}.")
        for key, _ in root.value:
            self._note(key.value, key.start_mark.line + 1)
        self.values = loaded

    def _note(self, key: str, line: int) -> None:
        if key in self.lines:
            raise ConfigError(
                f"{self.path}, line {line}: {key!r} is there already, in line {self.lines[key]}. Keep one."
            )
        self.lines[key] = line

    def where(self, key: str) -> str:
        return f"{self.path}, line {self.lines[key]}, {key}"

    def check(self, dataclass_types: Collection[type]) -> None:
        """Every key is a setting, and every value has its type.

        Raises:
            ConfigError: for the first that does not.
        """
        hints = setting_types(dataclass_types) | {"env": dict[str, Any]}
        for key, value in self.values.items():
            if key not in hints:
                raise ConfigError(f"{self.where(key)}: there is no such setting.{suggestion(key, hints)}")
            if not fits(value, hints[key]):
                raise ConfigError(f"{self.where(key)}: expected {spell(hints[key])}, got {value!r}.{hint(value)}")


def setting_types(dataclass_types: Collection[type]) -> dict[str, Any]:
    """The annotation of every field that can be set."""
    types = {}
    for dataclass in dataclass_types:
        hints = get_type_hints(dataclass)
        types |= {field.name: hints[field.name] for field in fields(dataclass) if field.init}
    return types


def suggestion(name: str, known: Collection[str]) -> str:
    """The known name that is closest, as a sentence; nothing if none is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def hint(value: Any) -> str:
    if isinstance(value, bool):
        return " YAML reads yes, no, on and off as true and false: put a word in quotes."
    return ""


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value out of a YAML file can be used for a setting. A text will do for a number that it spells, as for `1e-6`."""
    if annotation is Any:
        return True
    if annotation is None or annotation is NoneType:
        return value is None
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(fits(entry, arguments[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict)
    if annotation in (int, float):
        return _is_number(value, annotation)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return value in [entry.value for entry in annotation]
    return isinstance(value, annotation)


def _is_number(value: Any, kind: type) -> bool:
    if isinstance(value, str):
        try:
            kind(value)
        except ValueError:
            return False
        return True
    return isinstance(value, (int, kind)) and not isinstance(value, bool)


def spell(annotation: Any) -> str:
    """An annotation in words."""
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(dict.fromkeys(spell(argument) for argument in arguments))
    if get_origin(annotation) is Literal:
        return f"one of {list(arguments)}"
    if get_origin(annotation) is list:
        return f"a list, each entry {spell(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"one of {[entry.value for entry in annotation]}"
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        NoneType: "null",
    }
    return words.get(annotation, "a mapping" if dict in (annotation, get_origin(annotation)) else str(annotation))
