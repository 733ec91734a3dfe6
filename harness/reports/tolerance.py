"""How far a figure may lie from the one it is compared with, and why.

A run repeats to the bit on the same machine, thread count and sources. Elsewhere sums are taken in another order, and
what that moves depends on how often a rounding depends on them:

    float, 5 to 8 bits     .1 %   logits move in their sixth digit; single int8 activations round the other way
    4 bits, data-free      .2 %   codes are the same, and what they decode to meets other sums
    4 bits, calibrated      2 %   one code that differs moves all that are chosen after it; GPTQ on OPT-125M differs by
                                  2.7 % between three GPUs (IST-DASLab/gptq, issue 1)
    3 bits                  5 %   the same, on coarser grids
    2 bits, 4-bit inputs   20 %   only their order among methods is to be relied on

KL follows the square of what moves a perplexity, so its share is twice as large, and it may move by 0.001 in any case.
Stored sizes are counted, so exact. A process's peak of memory holds what its allocator keeps of what was freed, by
chance: of 17 runs that were repeated on one machine, with bit-equal results, four peaks of evaluation moved by more
than 20 %, one by 43 %. So 50 % is all that can be held. (glibc's heap is why: where it may not keep blocks of 1 MiB
and more, three repeats of one run peaked within 0.4 % of one another.)
Times and their ratios are the machine's, shown and not judged.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from harness.records.store import Record

EXACT_METRICS = ("bits_per_weight", "model_size_mib", "resident_mib")
PEAKS = ("peak_memory_mib", "quantize_peak_mib")
SHOWN_METRICS = ("prefill_ms_p50", "prefill_speedup", "decode_ms_p50", "decode_speedup", "quantize_s")
_PEAK = 0.5
_WRITTEN = re.compile(r"(\+-|\+)(\d+(?:\.\d+)?)(%?)")


@dataclass(frozen=True)
class Tolerance:
    """A share of the expected value, or a distance from it; `one_sided` where a lower value is welcome."""

    size: float
    relative: bool = True
    one_sided: bool = False

    def __str__(self) -> str:
        if self.size == 0:
            return "exact"
        number = f"{100 * self.size:g} %" if self.relative else f"{self.size:.2g}"
        return f"{'+' if self.one_sided else '±'}{number}"

    def holds(self, value: float, expected: float) -> bool:
        """Whether `value` is near enough, or on the welcome side."""
        return abs(value - expected) <= self._room(expected) or self.better(value, expected)

    def better(self, value: float, expected: float) -> bool:
        """Whether `value` is lower than expected by more than the tolerance, where that is welcome."""
        return self.one_sided and value < expected - self._room(expected)

    def _room(self, expected: float) -> float:
        return self.size * abs(expected) if self.relative else self.size


EXACT = Tolerance(0.0)


def parse(written: str) -> Tolerance:
    """A tolerance as a table writes it: +-0.02, +-0.1%, or +2% where lower is welcome.

    Raises: ValueError for anything else.
    """
    found = _WRITTEN.fullmatch(written)
    if found is None:
        raise ValueError(f"tolerance={written!r} cannot be read; expected such as +-0.02, +-0.1% or +2%")
    sides, number, percent = found.groups()
    size = float(number) / (100 if percent else 1)
    return Tolerance(size, relative=bool(percent), one_sided=sides == "+")


def of_metric(record: Record, name: str, same: bool) -> Tolerance | None:
    """The tolerance of a repeated figure; None for one that is shown and not judged.

    `same` says that machine, thread count and sources are those of `record`, so that results repeat to the bit.
    """
    if name in EXACT_METRICS:
        return EXACT
    if name in PEAKS:
        return Tolerance(_PEAK)
    share = 0.0 if same else _of_perplexity(record)
    if name == "kl":
        return Tolerance(0.0 if same else max(2 * share * record.metrics["kl"], 0.001), relative=False)
    if name not in ("nll", "perplexity"):
        return None
    return Tolerance(share) if name == "perplexity" else Tolerance(math.log1p(share), relative=False)


def _of_perplexity(record: Record) -> float:
    """The share by which a perplexity may move, from the format's width and whether data chose the codes."""
    config: dict[str, Any] = record.config
    if not config.get("method"):
        return 0.001
    scheme = config["scheme"]
    inputs = (scheme.get("activation") or {}).get("bits", 16)
    bits = scheme["weight"]["bits"]
    if bits == 2 or inputs <= 4:
        return 0.2
    if bits == 3:
        return 0.05
    if bits == 4:
        return 0.02 if record.data.calibration is not None else 0.002
    return 0.001
