"""Formats of a KV cache: how the keys and values of past tokens are stored. Numbers only, no algorithm.

Paper: KIVI, Liu et al. 2024, arXiv 2402.02750: a few channels of the keys are large in every token, so keys need one
scale per channel; values have no such channels, and need one scale per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from harness.core.checks import at_least
from harness.core.scheme import StoredFormat

# Word in a format's name -> the granularities of keys and of values that it implies.
_IMPLIED = {"token": ("token", "token"), "channel": ("channel", "channel"), "kivi": ("channel", "token")}


@dataclass(frozen=True, kw_only=True)
class StatesFormat(StoredFormat):
    """Format of keys, or of values, (B, heads, T, head_dim).

    granularity  token: `group_size` neighbouring channels of one token share a scale, -1 is the whole head;
                 channel: `group_size` consecutive tokens of one channel share a scale
    zero_point   an integer zero point takes one byte, a float one is stored as `scale_dtype`
    """

    granularity: Literal["token", "channel"]
    group_size: int = 32
    zero_point: Literal["integer", "float"] = "float"
    where: ClassVar[str] = "kv.{key,value}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1 and not (self.group_size == -1 and self.granularity == "token"):
            raise ValueError(
                f"group_size={self.group_size} is out of range with granularity={self.granularity}; expected a "
                "positive number, or -1 with granularity=token"
            )

    @property
    def tokens(self) -> int:
        """Number of tokens that are quantized together."""
        return self.group_size if self.granularity == "channel" else 1

    def channels(self, head_dim: int) -> int:
        """Number of channels of one token that share a scale.

        Raises: ValueError if `group_size` does not divide `head_dim`, or a token's codes do not fill whole bytes.
        """
        size = head_dim if self.group_size == -1 else self.group_size
        if self.granularity == "token" and head_dim % size:
            raise ValueError(
                f"{self.where}.group_size={size} does not divide head_dim={head_dim}; use a divisor, or -1"
            )
        if head_dim * self.bits % 8:
            raise ValueError(
                f"{self.where}.bits={self.bits} does not fill whole bytes with head_dim={head_dim}; use 8 bits, or 4"
            )
        return size if self.granularity == "token" else 1


@dataclass(frozen=True, kw_only=True)
class KVFormat:
    """Formats of keys and values. The newest `residual` tokens stay float, as do the tokens of an incomplete group."""

    name: str
    key: StatesFormat
    value: StatesFormat
    residual: int = 0

    def __post_init__(self) -> None:
        at_least(self, 0, "residual")

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


def _extra(fmt: StatesFormat, name: str, granularity: str | None) -> dict[str, Any]:
    """Fields of `fmt` that differ from their defaults and that the KV format's `name` does not imply."""
    changed = {item.name: getattr(fmt, item.name) for item in fields(fmt) if getattr(fmt, item.name) != item.default}
    if str(fmt.bits) in name:
        del changed["bits"]
    if fmt.granularity == granularity:
        del changed["granularity"]
    return changed
