"""Published figures beside records of the same setting: results/published.csv.

A row names a model, a method and a format as the configurations do; `options` holds further values of the
configuration that have to be so, as `method.gptq.act_order=false`. A record belongs to a row if all of these agree and
nothing else of its method is off its defaults. Scales' float type and the calibration text are compared where a row
names them.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from harness.cli import table
from harness.records.store import Record
from harness.reports.tolerance import Tolerance, parse
from harness.reports.verdict import Figure, Report

COLUMNS = (
    "experiment",
    "model",
    "method",
    "scheme",
    "bits",
    "options",
    "data",
    "protocol",
    "windows",
    "metric",
    "value",
    "tolerance",
    "source",
    "verified",
    "note",
)
_ANYTHING = object()

Json = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One published figure.

    experiment  the file of conf/experiment that runs it
    method      its steps, joined by +; none for the float model, whose scheme and bits are empty
    options     further keys of the configuration, and their values
    windows     how many were scored; None for all of the text
    verified    whether the figure was read in its source, and not in notes about it
    """

    experiment: str
    model: str
    method: str
    scheme: str
    bits: int | None
    options: Mapping[str, Any]
    data: str
    protocol: str
    windows: int | None
    metric: str
    value: float
    tolerance: Tolerance
    source: str
    verified: bool
    note: str

    @property
    def label(self) -> str:
        """The setting in a few words."""
        parts = [self.model, self.method, self.scheme, f"bits={self.bits}" if self.bits else ""]
        options = [f"{key.split('.', 1)[1]}={_written(value)}" for key, value in self.options.items()]
        return " ".join(part for part in (*parts, *options) if part)


def read(path: Path) -> list[Row]:
    """The rows of a table.

    Raises: ValueError, in one line, for a file, a column or a value that cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"published={path} is no file; expected a table such as results/published.csv")
    with path.open(newline="") as stream:
        lines = csv.DictReader(stream)
        if tuple(lines.fieldnames or ()) != COLUMNS:
            raise ValueError(f"published={path} has other columns; expected: {', '.join(COLUMNS)}")
        return [_row(path, number, line) for number, line in enumerate(lines, start=2)]


def report(rows: Sequence[Row], records: Sequence[Record], only: str = "") -> Report:
    """Each row beside the records of its setting; rows of experiments that were not run at all are only counted.

    With `only`, a row that has no record is shown if that is a part of its name.
    """
    found = {
        i: [record for record in records if matches(row, record.config, record.options)] for i, row in enumerate(rows)
    }
    run = {rows[i].experiment for i, matched in found.items() if matched}
    result = Report(f"{sum(map(bool, found.values()))} of {len(rows)} published figures beside {len(records)} records")
    for i, row in enumerate(rows):
        if row.experiment in run:
            result.figures += [_figure(row, record) for record in found[i]]
            if not found[i] and fnmatch(row.label, f"*{only}*"):
                result.figures.append(_missing(row))
    left = Counter(row.experiment for row in rows if row.experiment not in run)
    result.notes += [f"not run here: {count} figures of experiment={name}" for name, count in left.items()]
    known = {record.run_id for matched in found.values() for record in matched}
    others = [table.label(record) for record in records if record.run_id not in known]
    result.notes += [f"no published figure for: {', '.join(others)}"] if others else []
    return result


def matches(row: Row, config: Json, options: Mapping[str, Any]) -> bool:
    """Whether a run of `config`, with `options` of its method off their defaults, is of the row's setting."""
    steps = config.get("method") or {}
    if row.model != config["model"]["name"] or row.method != ("+".join(steps) or "none"):
        return False
    if row.protocol != _protocol(config):
        return False
    if any(_at(config, key) != value for key, value in row.options.items()):
        return False
    wanted = {"data.source": row.data, "data.max_windows": row.windows, "model.dtype": "auto"}
    if steps:
        changed = {key if key.startswith("engine.") else f"method.{key}" for key in options}
        if not changed <= set(row.options):
            return False
        wanted |= dict(_format(row, config))
    return all(_at(config, key) == value for key, value in wanted.items() if key not in row.options)


def _protocol(config: Json) -> str:
    """The id of a protocol, as records have it."""
    parts = [_at(config, f"data.{key}") for key in ("protocol", "seq_len", "stride")]
    return "-".join(str(part) for part in parts if part not in (None, _ANYTHING))


def _format(row: Row, config: Json) -> Iterator[tuple[str, Any]]:
    """The numeric format, by key of the configuration: that of the scheme's name, as it is shipped."""
    yield from {"scheme.name": row.scheme, "scheme.weight.bits": row.bits, "skip": []}.items()
    own_grid = "narrow" if _at(config, "scheme.activation") else "full"
    yield from {"scheme.weight.grid": own_grid, "scheme.weight.zero_point": "integer"}.items()
    size = row.scheme.removeprefix("group").removesuffix("_sym")
    yield "scheme.weight.group_size", int(size) if size.isdecimal() else -1


def _figure(row: Row, record: Record) -> Figure:
    notes = "; ".join(filter(None, [row.source, "" if row.verified else "from notes", row.note]))
    return Figure(table.label(record), row.metric, record.metrics.get(row.metric), row.value, row.tolerance, notes)


def _missing(row: Row) -> Figure:
    return Figure(row.label, row.metric, None, row.value, row.tolerance, f"no such record; {row.source}", "MISSING")


def _row(path: Path, number: int, line: dict[str, str]) -> Row:
    try:
        return Row(
            **{name: line[name] for name in ("experiment", "model", "method", "scheme", "data", "protocol", "metric")},
            bits=int(line["bits"]) if line["bits"] else None,
            options=dict(map(_option, line["options"].split())),
            windows=None if line["windows"] == "all" else int(line["windows"]),
            value=float(line["value"]),
            tolerance=parse(line["tolerance"]),
            source=line["source"],
            verified={"yes": True, "no": False}[line["verified"]],
            note=line["note"],
        )
    except (ValueError, KeyError) as error:
        raise ValueError(f"published={path} line {number}: {error}; correct the line") from error


def _option(written: str) -> tuple[str, Any]:
    key, _, value = written.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _at(config: Any, dotted: str) -> Any:
    """A value of the configuration; one that is not there equals nothing."""
    for key in dotted.split("."):
        if not isinstance(config, Mapping) or key not in config:
            return _ANYTHING
        config = config[key]
    return config
