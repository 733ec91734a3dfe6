"""The same run in two folders: which two records are a pair, and which of their figures moved beyond noise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from harness.records import Record
from harness.records.metrics import METRICS
from harness.reports.intervals import Interval, difference, interval, windows
from harness.reports.seeds import identity

_COUNTED = tuple(metric.name for metric in METRICS if metric.kind == "exact")
# Times with percentiles, without the _p50 of their median.
_TIMES = tuple(
    metric.name.removesuffix("_p10") for metric in METRICS if metric.kind == "time" and metric.name.endswith("_p10")
)


@dataclass(frozen=True)
class Pair:
    """The same run in both folders; `difference` is new - old in nll, None if one of them was not scored."""

    old: Record
    new: Record
    difference: Interval | None

    @property
    def verdict(self) -> str:
        """A word or two: whether the perplexity moved beyond its interval; for a failed run, both states."""
        if "failed" in (self.old.status, self.new.status):
            return self.new.status if self.old.status == self.new.status else f"{self.old.status} -> {self.new.status}"
        if self.difference is None:
            return "not scored"
        if windows(self.old) == windows(self.new):
            return "identical"
        if self.difference.how == "none":
            return "one window"
        return "moved" if self.difference.sure else "same"

    @property
    def moved(self) -> bool:
        """Whether its row belongs to the top of the table."""
        return self.verdict == "moved" or "->" in self.verdict


def match(
    old: Sequence[Record], new: Sequence[Record], places: Sequence[str]
) -> tuple[list[Pair], list[tuple[Record, str]]]:
    """The pairs of two folders, and the records without exactly one partner, each with the reason."""
    sides = [_by_identity(old), _by_identity(new)]
    pairs: list[Pair] = []
    alone: list[tuple[Record, str]] = []
    for key in dict.fromkeys((*sides[0], *sides[1])):
        candidates = [side[key] for side in sides]
        if len(candidates[0]) == len(candidates[1]) == 1:
            pairs.append(pair_of(candidates[0][0], candidates[1][0]))
            continue
        for place, records in zip(places, candidates, strict=True):
            why = f"{len(records)} alike in {place}" if all(candidates) else f"only in {place}"
            alone += [(record, why) for record in records]
    return pairs, alone


def pair_of(old: Record, new: Record) -> Pair:
    """Two records as a pair.

    Raises: ValueError if both were scored, on different tokens.
    """
    return Pair(old, new, difference(new, old) if windows(old) and windows(new) else None)


def other_changes(old: Record, new: Record) -> list[str]:
    """Other figures that moved: counts that differ, times whose spans p10 to p90 are apart, KL beyond its interval."""
    changes = [
        (name, old.metrics[name], new.metrics[name])
        for name in _COUNTED
        if name in old.metrics and name in new.metrics and old.metrics[name] != new.metrics[name]
    ]
    if old.config.get("measure") == new.config.get("measure"):  # otherwise the times are of different work
        changes += [(name, *_medians(old, new, name)) for name in _TIMES if _disjoint(old, new, name)]
    kl_old, kl_new = windows(old, "window_kl"), windows(new, "window_kl")
    if 0 < len(kl_old) == len(kl_new) and difference(new, old, "window_kl").sure:
        changes.append(("kl", interval(kl_old).mean, interval(kl_new).mean))
    return [f"{name} {before:.4g} -> {after:.4g}" for name, before, after in changes]


def _by_identity(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[identity(record)].append(record)
    return groups


def _medians(old: Record, new: Record, name: str) -> tuple[float, float]:
    return old.metrics[f"{name}_p50"], new.metrics[f"{name}_p50"]


def _disjoint(old: Record, new: Record, name: str) -> bool:
    """Whether the spans of a time from p10 to p90 share no point; False if one of them was not measured."""
    keys = [f"{name}_p{share}" for share in (10, 50, 90)]
    if not all(key in record.metrics for key in keys for record in (old, new)):
        return False
    low, high, new_low, new_high = (record.metrics[key] for record in (old, new) for key in (keys[0], keys[2]))
    return new_low > high or new_high < low
