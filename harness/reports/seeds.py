"""Runs that differ in their seed alone, as one: means, standard deviations, and how many there are."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from harness.records.store import Record
from harness.reports.frame import SETTING, at, describe, label
from harness.reports.intervals import Windows, windows

_MATTERS = (
    "model",
    "fingerprint",
    "tokens_sha256",
    "seq_len",
    "protocol",
    *SETTING,
    "device",
)


def identity(record: Record) -> str:
    """What a run is, its seed included, whatever version of the program ran it: runs of two folders match by it."""
    row = describe(record)
    found = {name: row[name] for name in _MATTERS}
    found["activation"] = at(record.config, "scheme", "activation") if row["scheme"] else None
    found["seed"] = row["seed"]
    return json.dumps(found, sort_keys=True, default=str)


def mean_over_seeds(records: Sequence[Record]) -> list[Record]:
    """One record for all that are equal in everything but seed, the run's or a step's; failed runs stay as they are.

    Its metrics are means, `<metric>_sd` the standard deviations, `seeds` their number; its windows are means too, so
    that intervals are those of the mean over these seeds. Random weights follow the seed: such models stay apart.
    Raises: ValueError if a seed was run twice.
    """
    groups: dict[str, dict[str, Record]] = defaultdict(dict)
    out = []
    for record in records:
        if record.status != "ok":
            out.append(record)
            continue
        seeds, rest = _split(record)
        group = groups[identity(rest) + json.dumps(record.config.get("measure"), sort_keys=True)]
        if seeds in group:
            raise ValueError(
                f"seeds=mean: runs {group[seeds].run_id} and {record.run_id} are both {label(record)} with seed "
                f"{record.config.get('seed')}; expected one for each seed, remove the older record"
            )
        group[seeds] = record
    return out + [_mean(list(group.values())) for group in groups.values()]


def _split(record: Record) -> tuple[str, Record]:
    """A run's seeds, its own and its steps', and the run without them."""
    steps = {key: value for key, value in record.options.items() if key.endswith(".seed")}
    rest = {key: value for key, value in record.options.items() if key not in steps}
    seeds = json.dumps([record.config.get("seed"), steps], sort_keys=True)
    return seeds, replace(record, config=record.config | {"seed": None}, options=rest)


def _mean(group: Sequence[Record]) -> Record:
    """The record of a group; a figure that one of them lacks is absent."""
    _, rest = _split(group[0])
    metrics: dict[str, float] = {"seeds": len(group)}
    for name in set.intersection(*(set(record.metrics) for record in group)):
        values = [record.metrics[name] for record in group]
        metrics[name] = math.fsum(values) / len(values)
        if len(values) > 1:
            metrics[f"{name}_sd"] = statistics.stdev(values)
    nll, kl = (_mean_windows(group, of) for of in get_args(Windows))
    run = "+".join(record.run_id for record in group)
    return replace(rest, run_id=run, metrics=metrics, layers=[], warnings=[], stages={}, window_nll=nll, window_kl=kl)


def _mean_windows(group: Sequence[Record], of: Windows) -> list[float]:
    rows = [windows(record, of) for record in group]
    if len({len(row) for row in rows}) > 1:
        return []
    return [math.fsum(column) / len(group) for column in zip(*rows, strict=True)]
