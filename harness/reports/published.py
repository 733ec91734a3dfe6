"""Published figures compared with records of the same setting: results/published.csv.

A row names a model, a method and a format as configurations do; `options` has further keys of the configuration and
their values, as `method.gptq.act_order=false`. A record belongs to a row if all of these agree and every other option
of its method has its default. The float type of scales and the calibration text are compared only if a row names them.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from harness.records import Record
from harness.records.metrics import metric_of
from harness.reports.describe import label, usual_fields
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
    method      its steps, joined by +; none for the float model, which has no scheme and no bits
    options     further keys of the configuration, and their values
    windows     number of scored windows; None for the whole text
    verified    whether the figure was read in its source itself, not in notes about it
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
        options = [f"{key.split('.', 1)[1]}={_as_text(value)}" for key, value in self.options.items()]
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
    """Each row with the records of its setting; rows of experiments without any record are only counted.

    With `only`, a row without a record is shown if `only` is a part of its name.
    """
    matched = [[record for record in records if matches(row, record.config, record.options)] for row in rows]
    experiments = {row.experiment for row, members in zip(rows, matched, strict=True) if members}
    result = Report(f"{sum(map(bool, matched))} of {len(rows)} published figures compared with {len(records)} records")
    for row, members in zip(rows, matched, strict=True):
        result.figures += [_figure(row, record) for record in members]
        if not members and row.experiment in experiments and fnmatch(row.label, f"*{only}*"):
            result.figures.append(_missing(row))
    result.notes = _notes(rows, records, matched, experiments)
    return result


def _notes(
    rows: Sequence[Row], records: Sequence[Record], matched: Sequence[Sequence[Record]], experiments: Set[str]
) -> list[str]:
    """The experiments that were not run, and the records that no row is about."""
    counts = Counter(row.experiment for row in rows if row.experiment not in experiments)
    lines = [f"not run here: {count} figures of experiment={name}" for name, count in counts.items()]
    published = {record.run_id for members in matched for record in members}
    others = [label(record) for record in records if record.run_id not in published]
    return lines + ([f"no published figure for: {', '.join(others)}"] if others else [])


def matches(row: Row, config: Json, options: Mapping[str, Any]) -> bool:
    """Whether a run of `config`, with these `options` of its method not at their defaults, has the row's setting."""
    steps = config.get("method") or {}
    if row.model != config["model"]["name"] or row.method.replace("+", "_") != ("_".join(steps) or "none"):
        return False
    if row.protocol != _protocol(config) or config.get("head") is not None:
        return False
    if any(_at(config, key) != value for key, value in row.options.items()):
        return False
    expected = {"data.source": row.data, "data.max_windows": row.windows, "model.dtype": "auto"}
    if steps:
        changed = {key if key.startswith("engine.") else f"method.{key}" for key in options}
        if not changed <= set(row.options):
            return False
        expected |= dict(_format(row, config))
    return all(_at(config, key) == value for key, value in expected.items() if key not in row.options)


def _protocol(config: Json) -> str:
    """The protocol in the form of records."""
    parts = [_at(config, f"data.{key}") for key in ("protocol", "seq_len", "stride")]
    bos = {"always": "bos", "never": "nobos"}.get(_at(config, "data.bos"))
    return "-".join(str(part) for part in (*parts, bos) if part not in (None, _ANYTHING))


def _format(row: Row, config: Json) -> Iterator[tuple[str, Any]]:
    """The numeric format by key of the configuration: that of the shipped scheme with this name."""
    size = row.scheme.removeprefix("group").removesuffix("_sym")
    fields = {"group_size": int(size) if size.isdecimal() else -1} | usual_fields(config["scheme"])
    weight = {name: value for name, value in fields.items() if name != "scale_dtype"}
    yield from {"scheme.name": row.scheme, "skip": []}.items()
    if row.scheme == "none":  # the method has codes of its own, and their width
        yield f"method.{row.method}.bits", row.bits
    else:
        yield from {f"scheme.weight.{name}": value for name, value in {**weight, "bits": row.bits}.items()}.items()


def _figure(row: Row, record: Record) -> Figure:
    notes = "; ".join(filter(None, [row.source, "" if row.verified else "from notes", row.note]))
    return Figure(label(record), row.metric, record.metrics.get(row.metric), row.value, row.tolerance, notes)


def _missing(row: Row) -> Figure:
    return Figure(row.label, row.metric, None, row.value, row.tolerance, f"no such record; {row.source}", "MISSING")


def _row(path: Path, number: int, line: dict[str, str]) -> Row:
    try:
        return Row(
            **{name: line[name] for name in ("experiment", "model", "method", "scheme", "data", "protocol")},
            metric=metric_of(line["metric"]).name,
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


def _option(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _at(config: Any, dotted: str) -> Any:
    """A value of the configuration; a missing one equals nothing."""
    for key in dotted.split("."):
        if not isinstance(config, Mapping) or key not in config:
            return _ANYTHING
        config = config[key]
    return config
