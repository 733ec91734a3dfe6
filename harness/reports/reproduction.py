"""A record and its rerun, figure by figure, and what differs around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from harness.records import Environment, Record
from harness.reports.frame import label
from harness.reports.tolerance import EXACT_METRICS, PEAKS, SHOWN_METRICS, of_metric
from harness.reports.verdict import Figure

_METRICS = ("perplexity", "nll", "kl", *EXACT_METRICS, *PEAKS, *SHOWN_METRICS)
_BYSTANDERS = ("commit", "platform")  # named, but what they may change shows in the code or not at all

Json = dict[str, Any]


def compare(expected: Record, found: Record) -> list[Figure]:
    """The figures of a record beside those of its rerun; one that the rerun lacks fails."""
    same = repeatable(expected, found)
    name = label(expected)
    figures = []
    for metric in _METRICS:
        if metric in expected.metrics:
            limit = of_metric(expected, metric, same)
            value = found.metrics.get(metric)
            figures.append(Figure(name, metric, value, expected.metrics[metric], limit, _note(metric, expected, found)))
    return figures


def repeatable(expected: Record, found: Record) -> bool:
    """Whether machine, thread count, libraries and sources are those of the record: then results repeat to the bit."""
    known = [name for name, *_ in environment_differences(expected, found) if name not in _BYSTANDERS]
    return not known and (expected.run_id, expected.code) == (found.run_id, found.code)


def environment_differences(expected: Record, found: Record) -> list[tuple[str, str, str]]:
    """What the environments of two records differ in: name, recorded, here."""
    before, now = _flat(expected.environment), _flat(found.environment)
    names = list(dict.fromkeys([*before, *now]))
    return [(name, str(before.get(name)), str(now.get(name))) for name in names if before.get(name) != now.get(name)]


def notes(pairs: Sequence[tuple[Record, Record]]) -> list[str]:
    """What differs around the runs: environment, sources, texts and kernels; each once."""
    seen: dict[str, set[tuple[str, str]]] = {}
    for expected, found in pairs:
        for name, before, now in (*environment_differences(expected, found), *_circumstances(expected, found)):
            seen.setdefault(name, set()).add((before, now))
    lines = [f"{name}: {_changes(changes)}" for name, changes in seen.items()]
    if pairs and not set(seen) - {"commit"}:
        lines.append("environment: nothing else differs")
    same = sum((expected.run_id, expected.code) == (found.run_id, found.code) for expected, found in pairs)
    lines.append(f"code and configuration: those of the record in {same} of {len(pairs)} runs")
    return lines


def _circumstances(expected: Record, found: Record) -> Iterator[tuple[str, str, str]]:
    """What differs between two runs beside the environment."""
    before, now = _identity(expected), _identity(found)
    yield from ((name, before[name], now[name]) for name in before if before[name] != now[name])


def _identity(found: Record) -> dict[str, str]:
    """What a run read and ran with, by its record."""
    return {
        "evaluation tokens": str(found.data.evaluation and found.data.evaluation.tokens_sha256),
        "calibration tokens": str(found.data.calibration and found.data.calibration.tokens_sha256),
        "weights": str(found.model.fingerprint),
        "kernel": str(found.execution.kernel),
    }


def _changes(changes: set[tuple[str, str]]) -> str:
    return "; ".join(f"recorded {before}, here {now}" for before, now in sorted(changes))


def _note(metric: str, expected: Record, found: Record) -> str:
    if metric not in ("perplexity", "nll") or not expected.window_nll:
        return ""
    if expected.window_nll == found.window_nll:
        return "identical in every window"
    return "expected to be identical" if repeatable(expected, found) else ""


def _flat(environment: Environment) -> Json:
    values = asdict(environment)
    packages: Json = values.pop("packages")
    return {name: value for name, value in values.items() if value is not None} | packages
