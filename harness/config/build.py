"""Builds a dataclass from a mapping, whose keys and types are checked against the fields of the class."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from harness.utils.errors import Refusal, UnknownKey, choices, short

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], key: str, extra: Mapping[str, Any] | None = None) -> T:
    """Build the dataclass `cls` from `values`, whose keys and types are checked against its fields.

    `key` is the path of `values` in the configuration, for messages; `extra` has fields that are already built.
    Raises: ValueError, in one line, for an unknown or missing key, a wrong type or a value that the class refuses.
    """
    prefix = f"{key}." if key else ""
    if not isinstance(values, Mapping):
        raise Refusal(f"{key}={short(values)} is not a mapping; expected the keys of {cls.__name__}")
    hints = get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls) if item.name not in (extra or {})]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            raise UnknownKey(_argument(f"{prefix}{name}", values[name]), [prefix + known for known in names])
    if missing := [name for name in _required(cls) if name not in {**values, **(extra or {})}]:
        raise Refusal(f"{prefix}{missing[0]} is missing; set it in the configuration or on the command line")
    checked = {name: _convert(value, hints[name], prefix + name) for name, value in values.items()}
    try:
        return cls(**checked, **(extra or {}))
    except Refusal as error:
        raise type(error)(f"{prefix}{error}") from error
    except ValueError as error:
        raise Refusal(f"{prefix}{error}") from error


def _argument(key: str, value: Any) -> str:
    """KEY=VALUE as it was typed; a mapping of one key is written as KEY.KEY=VALUE."""
    while isinstance(value, Mapping) and len(value) == 1:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    return f"{key}={value!r}"


def _required(cls: type) -> list[str]:
    """The names of the fields that have no default."""
    missing = dataclasses.MISSING
    return [
        item.name for item in dataclasses.fields(cls) if item.default is missing and item.default_factory is missing
    ]


def _convert(value: Any, hint: Any, key: str) -> Any:
    """Convert `value` to the annotated type `hint`; a conversion that would lose information is an error."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        inner = [arg for arg in get_args(hint) if arg is not type(None)]
        if len(inner) > 1 and all(map(dataclasses.is_dataclass, inner)):
            return build(_closest(inner, value), value, key)
        if len(inner) > 1:  # several types are allowed: the class itself checks
            return value
        return _convert(value, inner[0], key)
    if origin is Literal:
        if value not in get_args(hint) or isinstance(value, bool) != isinstance(get_args(hint)[0], bool):
            raise Refusal(
                f"{key}={short(repr(value))} is unknown; {choices(str(value), [str(arg) for arg in get_args(hint)])}"
            )
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, key)
    if origin in (tuple, list):
        return origin(_convert_list(value, get_args(hint)[0], key))
    if not isinstance(hint, type) or origin is not None:  # mappings and other containers: the class itself checks
        return value
    return _convert_scalar(value, hint, key)


def _closest(classes: Sequence[type], value: Any) -> type:
    """The class whose fields the keys of `value` fit best; the first one of several that fit alike."""
    keys = set(value) if isinstance(value, Mapping) else set()

    def misfits(cls: type) -> int:
        known = {item.name for item in dataclasses.fields(cls)}
        return len(keys - known) + len(set(_required(cls)) - keys)

    return min(classes, key=misfits)


def _convert_list(value: Any, hint: Any, key: str) -> list[Any]:
    """The items of a list, converted to the type `hint`; a single value is a list of one."""
    if value is None or isinstance(value, Mapping):
        raise Refusal(f"{key}={short(value)} is not a list; expected [value, ...]")
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [_convert(value, hint, key)]
    return [_convert(item, hint, f"{key}[{i}]") for i, item in enumerate(value)]


def _convert_scalar(value: Any, hint: type, key: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # a folder or a name that looks like a number
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise Refusal(f"{key}={short(repr(value))} has type {type(value).__name__}; expected {hint.__name__}")
    return value
