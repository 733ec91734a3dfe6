"""Formats of a KV cache: how the keys and values of past tokens are stored. Numbers only, no algorithm.

Paper: KIVI, Liu et al. 2024, arXiv 2402.02750: a few channels of the keys are large in every token, so keys need one
scale per channel; values have no such channels, and need one scale per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from harness.core.checks import at_least
from harness.core.formats.states_format import FloatStates, IntStates, LevelsStates

# Word in a format's name -> the granularities of keys and of values that it implies.
_IMPLIED = {
    "token": ("token", "token"),
    "channel": ("channel", "channel"),
    "kivi": ("channel", "token"),
    "fp": ("token", "token"),
    "lm": ("token", "token"),
}
# Word in a format's name -> other fields that it implies, of keys and of values.
_FIELDS: dict[str, dict[str, Any]] = {
    "fp8": {"element": "e4m3", "group_size": -1, "scale_dtype": "bfloat16"},
    "nvfp4": {"element": "e2m1", "group_size": 16, "scale_dtype": "e4m3"},
    "lm": {"table": "lloyd_max"},
    "rotated": {"rotated": True},
}


@dataclass(frozen=True, kw_only=True)
class KVFormat:
    """Formats of keys, after their rotary embedding, and of values.

    The newest `residual` tokens stay float, as do the tokens of an incomplete group.
    """

    name: str
    key: IntStates | FloatStates | LevelsStates
    value: IntStates | FloatStates | LevelsStates
    residual: int = 0

    def __post_init__(self) -> None:
        at_least(self, 0, "residual")

    def of_layer(self, layer: int) -> KVFormat:
        """The format in the layer of this number."""
        return self

    @property
    def tokens(self) -> int:
        """Period, in tokens, with which groups of keys and groups of values are complete at the same time."""
        return math.lcm(self.key.tokens, self.value.tokens)

    @property
    def label(self) -> str:
        """The name plus all settings that it does not imply, so that different formats get different table rows."""
        implied = next((pair for word, pair in _IMPLIED.items() if word in self.name), (None, None))
        key, value = (_extra(fmt, self.name, of) for fmt, of in zip((self.key, self.value), implied, strict=True))
        common = {field: x for field, x in key.items() if value.get(field) == x}
        settings = common | {f"key.{field}": x for field, x in key.items() if field not in common}
        settings |= {f"value.{field}": x for field, x in value.items() if field not in common}
        settings |= {"residual": self.residual} if self.residual else {}
        return " ".join([self.name, *(f"{field}={x}" for field, x in settings.items())])


@dataclass(frozen=True, kw_only=True)
class LayeredKV(KVFormat):
    """A format whose layers have scales of their own; `key` and `value` are those of the first layer."""

    layers: tuple[KVFormat, ...]

    def of_layer(self, layer: int) -> KVFormat:
        return self.layers[layer]

    @property
    def label(self) -> str:
        return self.name


def _extra(fmt: IntStates | FloatStates | LevelsStates, name: str, granularity: str | None) -> dict[str, Any]:
    """Fields of `fmt` that differ from what the KV format's `name` implies, or else from their defaults."""
    implied: dict[str, Any] = {item.name: item.default for item in fields(fmt)}
    implied |= {"granularity": granularity, "bits": fmt.bits if str(fmt.bits) in name else None}
    for word, settings in _FIELDS.items():
        implied |= settings if word in name else {}
    return {item.name: x for item in fields(fmt) if (x := getattr(fmt, item.name)) != implied[item.name]}
