"""Formats of a checkpoint's weights in a few words, for tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from harness.core import QTensor
from harness.core.formats import MixedQTensor, PermutedQTensor, ScaledQTensor
from harness.core.formats.qtensor import GroupedQTensor
from harness.models.exchange.reader import FileQTensor

_SHOWN = 2  # formats of one checkpoint
_AROUND: dict[type[Any], str] = {
    PermutedQTensor: "act_order",
    MixedQTensor: "with float columns",
    ScaledQTensor: "with scaled columns",
}


def label_of(weight: QTensor) -> str:
    """The format of a weight: int4 group128, e4m3 channel, Q4_K."""
    for around, suffix in _AROUND.items():
        if isinstance(weight, around):
            return f"{label_of(weight.base)} {suffix}"
    if isinstance(weight, FileQTensor):
        return weight.label
    if not isinstance(weight, GroupedQTensor):
        return weight.kernel
    size = "" if weight.fmt.group_size == -1 else str(weight.fmt.group_size)
    return f"{weight.fmt.label} {weight.fmt.granularity}{size}"


def bits_of_codes(weight: QTensor) -> int | None:
    """Bits of a code; None for a format of a file, a lattice and sums of vectors."""
    if isinstance(weight, tuple(_AROUND)):
        base: QTensor = weight.base  # type: ignore[assignment]
        return bits_of_codes(base)
    return weight.fmt.bits if isinstance(weight, GroupedQTensor) else None


def summary(labels: Iterable[str]) -> str:
    """The formats of many weights, the most frequent first."""
    names = [name for name, _ in Counter(labels).most_common()]
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
