"""Builds a dataclass from a mapping: names and types are checked against its own fields."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from harness.utils.errors import choices

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], key: str, extra: Mapping[str, Any] | None = None) -> T:
    """Build the dataclass `cls` from `values`, checking names and types against its own fields.

    `key` is the path of `values` in the configuration, for messages; `extra` holds fields already built.
    """
    prefix = f"{key}." if key else ""
    if not isinstance(values, Mapping):
        raise ValueError(f"{key}={values!r} is no mapping; expected the keys of {cls.__name__}")
    hints = get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls) if item.name not in (extra or {})]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            raise ValueError(f"{prefix}{name}={values[name]!r} is an unknown key; {choices(str(name), names)}")
    missing = [
        item.name
        for item in dataclasses.fields(cls)  # type: ignore[arg-type]
        if item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
        and item.name not in values
        and item.name not in (extra or {})
    ]
    if missing:
        raise ValueError(f"{prefix}{missing[0]} is missing; set it in the configuration or on the command line")
    checked = {name: _convert(value, hints[name], prefix + name) for name, value in values.items()}
    try:
        return cls(**checked, **(extra or {}))
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type `hint`; refuses what would lose anything."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        inner = [arg for arg in get_args(hint) if arg is not type(None)]
        if len(inner) > 1:  # a choice of types: the class itself has to check
            return value
        return _convert(value, inner[0], key)
    if origin is Literal:
        if value not in get_args(hint) or isinstance(value, bool) != isinstance(get_args(hint)[0], bool):
            raise ValueError(f"{key}={value!r} is unknown; {choices(str(value), [str(arg) for arg in get_args(hint)])}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, key)
    if origin in (tuple, list):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"{key}={value!r} is no list; expected [value, ...]")
        return origin(_convert(item, get_args(hint)[0], f"{key}[{i}]") for i, item in enumerate(value))
    if not isinstance(hint, type) or origin is not None:  # mappings and the like: the class itself has to check
        return value
    return _convert_scalar(value, hint, key)


def _convert_scalar(value: Any, hint: type, key: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # a folder or a name that looks like a number
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{key}={value!r} has type {type(value).__name__}; expected {hint.__name__}")
    return value
