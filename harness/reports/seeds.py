"""Runs that differ only in their seed, as one: means, standard deviations, and the number of seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from harness.records import Record
from harness.reports.describe import SETTING, at, describe, label
from harness.reports.intervals import Windows, windows

_IDENTITY = ("model", "fingerprint", "tokens_sha256", "seq_len", "protocol", *SETTING, "device", "seed")


def identity(record: Record) -> str:
    """What a run is, its seed included, whatever code ran it: runs of two folders match by it."""
    row = describe(record)
    values = {name: row[name] for name in _IDENTITY}
    values["activation"] = at(record.config, "scheme", "activation") if row["scheme"] else None
    return json.dumps(values, sort_keys=True, default=str)


def mean_over_seeds(records: Sequence[Record]) -> list[Record]:
    """One record for all that are equal in everything but a seed, the run's or a step's; failed runs stay as they are.

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
        seeds, seedless = _split(record)
        group = groups[identity(seedless) + json.dumps(record.config.get("measure"), sort_keys=True)]
        if seeds in group:
            raise ValueError(
                f"seeds=mean: runs {group[seeds].run_id} and {record.run_id} are both {label(record)} with seed "
                f"{record.config.get('seed')}; expected one for each seed, remove the older record"
            )
        group[seeds] = record
    return out + [_mean(list(group.values())) for group in groups.values()]


def _split(record: Record) -> tuple[str, Record]:
    """The seeds of a run and of its steps, and the run without them."""
    steps = {key: value for key, value in record.options.items() if key.endswith(".seed")}
    options = {key: value for key, value in record.options.items() if key not in steps}
    seeds = json.dumps([record.config.get("seed"), steps], sort_keys=True)
    return seeds, replace(record, config=record.config | {"seed": None}, options=options)


def _mean(group: Sequence[Record]) -> Record:
    """The record of a group; a metric that one of them lacks is absent."""
    _, seedless = _split(group[0])
    metrics: dict[str, float] = {"seeds": len(group)}
    for name in set.intersection(*(set(record.metrics) for record in group)):
        values = [record.metrics[name] for record in group]
        metrics[name] = math.fsum(values) / len(values)
        if len(values) > 1:
            metrics[f"{name}_sd"] = statistics.stdev(values)
    nll, kl = (_mean_windows(group, of) for of in get_args(Windows))
    run_id = "+".join(record.run_id for record in group)
    mean = replace(seedless, run_id=run_id, metrics=metrics, window_nll=nll, window_kl=kl)
    return replace(mean, layers=[], warnings=[], stages={})


def _mean_windows(group: Sequence[Record], of: Windows) -> list[float]:
    rows = [windows(record, of) for record in group]
    if len({len(row) for row in rows}) > 1:
        return []
    return [math.fsum(column) / len(group) for column in zip(*rows, strict=True)]
