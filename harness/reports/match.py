"""The same run in two folders: which two records those are, and what of them moved beyond noise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from harness.records.store import Record
from harness.reports.intervals import Interval, difference, interval, windows
from harness.reports.seeds import identity

_EXACT = ("bits_per_weight", "model_size_mib", "resident_mib")  # counted, not measured
_TIMES = ("prefill_ms", "decode_ms")


@dataclass(frozen=True)
class Pair:
    """The same run in both folders; `apart` is new - old in nll, None where one of them was not scored."""

    old: Record
    new: Record
    apart: Interval | None

    @property
    def verdict(self) -> str:
        """One word: whether the perplexity moved beyond its interval; or what became of a run that failed."""
        if "failed" in (self.old.status, self.new.status):
            return self.new.status if self.old.status == self.new.status else f"{self.old.status} -> {self.new.status}"
        if self.apart is None:
            return "not scored"
        if windows(self.old) == windows(self.new):
            return "identical"
        if self.apart.how == "none":
            return "one window"
        return "moved" if self.apart.sure else "same"

    @property
    def moved(self) -> bool:
        """Whether it belongs to the top."""
        return self.verdict == "moved" or "->" in self.verdict


def match(
    old: Sequence[Record], new: Sequence[Record], places: list[str]
) -> tuple[list[Pair], list[tuple[Record, str]]]:
    """The pairs of two folders, and the records that have no partner, or more than one, with what to say of them."""
    sides = [_by_identity(old), _by_identity(new)]
    pairs: list[Pair] = []
    alone: list[tuple[Record, str]] = []
    for key in dict.fromkeys((*sides[0], *sides[1])):
        found = [side[key] for side in sides]
        if len(found[0]) == len(found[1]) == 1:
            pairs.append(Pair(found[0][0], found[1][0], paired_difference(found[0][0], found[1][0])))
            continue
        for place, records in zip(places, found, strict=True):
            why = f"{len(records)} alike in {place}" if all(found) else f"only in {place}"
            alone += [(record, why) for record in records]
    return pairs, alone


def _by_identity(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[identity(record)].append(record)
    return found


def paired_difference(old: Record, new: Record) -> Interval | None:
    """The interval of new - old in nll; None where one of them was not scored.

    Raises: ValueError if both were, on different tokens.
    """
    return difference(new, old) if windows(old) and windows(new) else None


def others_that_moved(old: Record, new: Record) -> list[str]:
    """Other figures: counted ones that differ, times whose spans p10 to p90 lie apart, KL beyond its interval."""
    found = [(name, old.metrics.get(name), new.metrics.get(name)) for name in _EXACT]
    moved = [(name, was, now) for name, was, now in found if None not in (was, now) and was != now]
    if old.config.get("measure") == new.config.get("measure"):  # else times are of different work
        moved += [(name, *_middle(old, new, name)) for name in _TIMES if _disjoint(old, new, name)]
    kl = [windows(record, "window_kl") for record in (old, new)]
    if 0 < len(kl[0]) == len(kl[1]) and difference(new, old, "window_kl").sure:
        moved.append(("kl", interval(kl[0]).mean, interval(kl[1]).mean))
    return [f"{name} {was:.4g} -> {now:.4g}" for name, was, now in moved]


def _middle(old: Record, new: Record, name: str) -> tuple[float, float]:
    return old.metrics[f"{name}_p50"], new.metrics[f"{name}_p50"]


def _disjoint(old: Record, new: Record, name: str) -> bool:
    """Whether the spans of a time from p10 to p90 share no point; False where one of them was not measured."""
    keys = [f"{name}_p{share}" for share in (10, 50, 90)]
    if not all(key in record.metrics for key in keys for record in (old, new)):
        return False
    low, high, new_low, new_high = (record.metrics[key] for record in (old, new) for key in (keys[0], keys[2]))
    return new_low > high or new_high < low
