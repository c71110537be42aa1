"""Checks of configuration values; all raise `ConfigError`."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", tuple: "a list", type(None): "null"}


_DTYPES = ("float32", "bfloat16")

Config = typing.TypeVar("Config")


class ConfigError(ValueError):
    """A configuration that is unknown, contradictory or impossible; the message names key, value and remedy."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_divides(name: str, value: int, by_name: str, by: int) -> None:
    require(by > 0 and value % by == 0, f"{name}={value} must be divisible by {by_name}={by}; change one of them.")


def is_of_type(value: Any, hint: Any) -> bool:
    """Whether a value has a type: a class, a union of them, `tuple[X, ...]` or `tuple[X, Y]`. Integers pass as numbers, booleans do not."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(is_of_type(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if items[-1] is Ellipsis:
            return all(is_of_type(item, items[0]) for item in value)
        return len(value) == len(items) and all(map(is_of_type, value, items))
    if hint is float:
        hint = (int, float)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def check_positive(name: str, value: Any) -> None:
    require(is_of_type(value, int) and value > 0, f"{name}={value!r} must be a positive integer.")


def check_sizes(config: Any, *names: str) -> None:
    """Checks that these fields of a dataclass are positive integers."""
    for name in names:
        check_positive(f"{type(config).__name__}.{name}", getattr(config, name))


def check_dtypes(config: Any) -> None:
    """Checks the fields `dtype` and `param_dtype` of a dataclass."""
    for name in ("dtype", "param_dtype"):
        value = getattr(config, name)
        require(value in _DTYPES, f"{type(config).__name__}.{name}={value!r} is not supported; use one of {', '.join(_DTYPES)}.")


def check_type(name: str, value: Any, hint: Any) -> None:
    """Checks a value against a type (see `is_of_type`)."""
    require(is_of_type(value, hint), f"{name}={value!r} must be {_describe(hint)}, not {type(value).__name__}; correct it.")


def check_fields(config: Any) -> None:
    """Checks the values of a dataclass against the types of its fields."""
    for name, hint in field_types(type(config)).items():
        check_type(f"{type(config).__name__}.{name}", getattr(config, name), hint)


def field_types(kind: type) -> Mapping[str, Any]:
    """The type of every field of a dataclass."""
    hints = typing.get_type_hints(kind)
    return types.MappingProxyType({field.name: hints[field.name] for field in dataclasses.fields(kind)})


def from_dict(kind: type[Config], content: Mapping[str, Any]) -> Config:
    """The dataclass that `dataclasses.asdict` (and JSON) made `content` of."""
    check_object(kind.__name__, content)
    hints = field_types(kind)
    reject_unknown(kind.__name__, content, set(hints))
    return kind(**{name: _from_plain(hints[name], value) for name, value in content.items()})


def _from_plain(hint: Any, value: Any) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    inner = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
    if inner and isinstance(value, Mapping):
        fitting = [option for option in inner if set(value) <= set(field_types(option))]
        return from_dict((fitting or inner)[0], value)
    return tuple(value) if isinstance(value, list) else value


def check_object(name: str, content: Any) -> None:
    require(isinstance(content, Mapping), f"{name}={content!r} must be a JSON object, not {type(content).__name__}.")


def reject_unknown(where: str, content: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(content) - known)
    require(not unknown, f"{where}: unknown keys {unknown}; remove them, or check the spelling against the released config.json.")


def require_fixed(where: str, content: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Checks that keys with one supported value have that value, or are absent."""
    for key, value in fixed.items():
        require(content.get(key, value) == value, f"{where}: {key}={content.get(key)!r} is not supported; only {value!r} is.")


def load_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; names the file where it is missing or broken."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give a directory or file of the released layout.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a directory or file of the released layout.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    check_object(str(path), content)
    return content


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(map(_describe, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        count = "" if items[-1] is Ellipsis else f" of {len(items)}"
        return f"a list{count}, each {_describe(items[0])}"
    return _NAMES.get(hint, f"of type {getattr(hint, '__name__', hint)}")
