"""How far a repeated figure may lie from the recorded one, and why.

A run repeats to the bit on the same machine, thread count and code. Elsewhere sums are taken in another order, and the
effect depends on how often a rounding depends on them:

    float, 5 to 8 bits     .1 %   logits differ in their sixth digit; single int8 activations round the other way
    4 bits, data-free      .2 %   codes are the same, but the sums over their values are not
    4 bits, calibrated      2 %   one code that differs changes all codes that are chosen after it; GPTQ on OPT-125M
                                  differs by 2.7 % between three GPUs (IST-DASLab/gptq, issue 1)
    3 bits                  5 %   the same, on coarser grids
    2 bits, 4-bit inputs   20 %   only the order of the methods is reliable

KL follows the square of what changes a perplexity, so its share is twice as large, and it may always move by 0.001.
Stored sizes are counted, so exact. The peak of a process contains freed memory that its allocator happens to keep: of
17 runs that were repeated on one machine, with bit-equal results, four peaks of evaluation moved by more than 20 %, one
by 43 %. So 50 % is the tightest limit that holds. (The reason is glibc's heap: where it may not keep blocks of 1 MiB
and more, three repeats of one run peaked within 0.4 % of one another.)
Times, energy and their ratios depend on the machine; they are shown and not judged.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from harness.records import Record
from harness.records.metrics import metric_of
from harness.reports.describe import code_bits

_PEAK = 0.5
_WRITTEN = re.compile(r"(\+-|\+)(\d+(?:\.\d+)?)(%?)")


@dataclass(frozen=True)
class Tolerance:
    """A share of the expected value, or a distance from it; `one_sided` if any lower value passes too."""

    size: float
    relative: bool = True
    one_sided: bool = False

    def __str__(self) -> str:
        if self.size == 0:
            return "exact"
        number = f"{100 * self.size:g} %" if self.relative else f"{self.size:.2g}"
        return f"{'+' if self.one_sided else '±'}{number}"

    def holds(self, value: float, expected: float) -> bool:
        """Whether `value` is near enough, or on the side that always passes."""
        return abs(value - expected) <= self._limit(expected) or self.better(value, expected)

    def better(self, value: float, expected: float) -> bool:
        """Whether a one-sided tolerance passes `value` although it is lower than expected by more than its size."""
        return self.one_sided and value < expected - self._limit(expected)

    def _limit(self, expected: float) -> float:
        return self.size * abs(expected) if self.relative else self.size


EXACT = Tolerance(0.0)


def parse(text: str) -> Tolerance:
    """A tolerance as tables write it: +-0.02, +-0.1%, or +2% where a lower value is better.

    Raises: ValueError for anything else.
    """
    match = _WRITTEN.fullmatch(text)
    if match is None:
        raise ValueError(f"tolerance={text!r} cannot be read; expected such as +-0.02, +-0.1% or +2%")
    sides, number, percent = match.groups()
    size = float(number) / (100 if percent else 1)
    return Tolerance(size, relative=bool(percent), one_sided=sides == "+")


def of_metric(record: Record, name: str, same: bool) -> Tolerance | None:
    """The tolerance of a repeated metric; None for one that is shown and not judged.

    `same` means that machine, thread count and code are those of `record`, so that results repeat to the bit.
    """
    kind = metric_of(name).kind
    if kind == "exact" or (kind == "result" and same):
        return EXACT
    if kind == "peak":
        return Tolerance(_PEAK)
    return _of_result(record, name) if kind == "result" else None


def _of_result(record: Record, name: str) -> Tolerance | None:
    """The tolerance of a result on another machine or by other code; only perplexity and KL have known ones."""
    share = _of_perplexity(record)
    if name == "kl":
        return Tolerance(max(2 * share * record.metrics["kl"], 0.001), relative=False)
    if name == "nll":
        return Tolerance(math.log1p(share), relative=False)
    return Tolerance(share) if name == "perplexity" else None


def _of_perplexity(record: Record) -> float:
    """The share by which a perplexity may move, from the width of the format and whether data chose the codes."""
    config: dict[str, Any] = record.config
    if not config.get("method"):
        return 0.001
    scheme = config["scheme"]
    input_bits, bits = code_bits(scheme.get("activation")) or 16, code_bits(scheme["weight"])
    if bits == 2 or input_bits <= 4:
        return 0.2
    if bits == 3:
        return 0.05
    if bits == 4:
        return 0.02 if record.data.calibration is not None else 0.002
    return 0.001
