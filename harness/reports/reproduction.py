"""A record and its rerun, figure by figure, and the differences between their machines, code and data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from harness.records import Environment, Record
from harness.records.metrics import METRICS
from harness.reports.describe import label
from harness.reports.tolerance import of_metric
from harness.reports.verdict import Figure

_HARMLESS = ("commit", "platform")  # named in notes; an effect on results shows in the code, or there is none

Json = dict[str, Any]


def compare(expected: Record, rerun: Record) -> list[Figure]:
    """The figures of a record with those of its rerun; one that the rerun lacks fails.

    Metrics that are neither judged nor columns of tables are left out.
    """
    same = repeatable(expected, rerun)
    name = label(expected)
    figures = []
    for metric in METRICS:
        if metric.name in expected.metrics:
            limit = of_metric(expected, metric.name, same)
            if metric.heading or limit:
                values = rerun.metrics.get(metric.name), expected.metrics[metric.name]
                figures.append(Figure(name, metric.name, *values, limit, _note(metric.name, expected, rerun)))
    return figures


def repeatable(expected: Record, rerun: Record) -> bool:
    """Whether machine, thread count, libraries and code are those of the record: then results repeat to the bit."""
    differences = [name for name, *_ in environment_differences(expected, rerun) if name not in _HARMLESS]
    return not differences and _same_code(expected, rerun)


def environment_differences(expected: Record, rerun: Record) -> list[tuple[str, str, str]]:
    """The differences between the environments of two records: name, recorded, here."""
    recorded, here = _flat(expected.environment), _flat(rerun.environment)
    names = list(dict.fromkeys([*recorded, *here]))
    return [
        (name, str(recorded.get(name)), str(here.get(name))) for name in names if recorded.get(name) != here.get(name)
    ]


def notes(pairs: Sequence[tuple[Record, Record]]) -> list[str]:
    """The differences between records and their reruns in environment, code, texts and kernels; each once."""
    differences: dict[str, set[tuple[str, str]]] = {}
    for expected, rerun in pairs:
        for name, recorded, here in (*environment_differences(expected, rerun), *_input_differences(expected, rerun)):
            differences.setdefault(name, set()).add((recorded, here))
    lines = [f"{name}: {_changes(changes)}" for name, changes in differences.items()]
    if pairs and not set(differences) - {"commit"}:
        lines.append("environment: nothing else differs")
    same = sum(_same_code(expected, rerun) for expected, rerun in pairs)
    lines.append(f"code and configuration: those of the record in {same} of {len(pairs)} runs")
    return lines


def _same_code(expected: Record, rerun: Record) -> bool:
    return (expected.run_id, expected.code) == (rerun.run_id, rerun.code)


def _input_differences(expected: Record, rerun: Record) -> Iterator[tuple[str, str, str]]:
    """The differences between two runs in texts, weights and kernel."""
    recorded, here = _inputs(expected), _inputs(rerun)
    yield from ((name, recorded[name], here[name]) for name in recorded if recorded[name] != here[name])


def _inputs(record: Record) -> dict[str, str]:
    return {
        "evaluation tokens": str(record.data.evaluation and record.data.evaluation.tokens_sha256),
        "calibration tokens": str(record.data.calibration and record.data.calibration.tokens_sha256),
        "weights": str(record.model.fingerprint),
        "kernel": str(record.execution.kernel),
    }


def _changes(changes: set[tuple[str, str]]) -> str:
    return "; ".join(f"recorded {recorded}, here {here}" for recorded, here in sorted(changes))


def _note(metric: str, expected: Record, rerun: Record) -> str:
    if metric not in ("perplexity", "nll") or not expected.window_nll:
        return ""
    if expected.window_nll == rerun.window_nll:
        return "identical in every window"
    return "expected to be identical" if repeatable(expected, rerun) else ""


def _flat(environment: Environment) -> Json:
    values = asdict(environment)
    packages: Json = values.pop("packages")
    return {name: value for name, value in values.items() if value is not None} | packages
