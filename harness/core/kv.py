"""Formats of a KV cache: what the keys and values of past tokens are stored as. Numbers only.

Paper: KIVI, Liu et al. 2024, arXiv 2402.02750: a few channels of the keys are large in every token, so that keys
want a scale a channel; values have no such channels, and want a scale a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from harness.core.ranges import at_least
from harness.core.scheme import StoredFormat

# Granularities of keys and of values that a word in a format's name stands for.
_SAID = {"token": ("token", "token"), "channel": ("channel", "channel"), "kivi": ("channel", "token")}


@dataclass(frozen=True, kw_only=True)
class StatesFormat(StoredFormat):
    """Format of keys, or of values, (B, heads, T, head_dim).

    granularity  token: `group_size` neighbouring channels of one token share a scale, -1 is the whole head;
                 channel: `group_size` consecutive tokens of one channel do
    zero_point   integer ones take a byte each, float ones are stored as `scale_dtype`
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
        """Tokens that are coded at a time."""
        return self.group_size if self.granularity == "channel" else 1

    def channels(self, head_dim: int) -> int:
        """Channels of one token that share a scale.

        Raises: ValueError if they do not divide the head, or if a token's codes do not fill whole bytes.
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
    """Formats of keys and values. The newest `residual` tokens stay float, and so do those of a group not yet full."""

    name: str
    key: StatesFormat
    value: StatesFormat
    residual: int = 0

    def __post_init__(self) -> None:
        at_least(self, 0, "residual")

    @property
    def tokens(self) -> int:
        """Tokens after which the same share of keys and values is float again."""
        return math.lcm(self.key.tokens, self.value.tokens)

    @property
    def label(self) -> str:
        """The name, and what of the format it does not say: what sets rows of a table apart."""
        said = next((pair for word, pair in _SAID.items() if word in self.name), (None, None))
        key, value = (_unsaid(fmt, self.name, of) for fmt, of in zip((self.key, self.value), said, strict=True))
        both = {field: x for field, x in key.items() if value.get(field) == x}
        found = both | {f"key.{field}": x for field, x in key.items() if field not in both}
        found |= {f"value.{field}": x for field, x in value.items() if field not in both}
        found |= {"residual": self.residual} if self.residual else {}
        return " ".join([self.name, *(f"{field}={x}" for field, x in found.items())])


def _unsaid(fmt: StatesFormat, name: str, granularity: str | None) -> dict[str, Any]:
    """Fields that neither the name of the whole says nor the defaults."""
    found = {item.name: getattr(fmt, item.name) for item in fields(fmt) if getattr(fmt, item.name) != item.default}
    if str(fmt.bits) in name:
        del found["bits"]
    if fmt.granularity == granularity:
        del found["granularity"]
    return found
