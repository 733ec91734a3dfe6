"""Reruns of committed records, and published tables beside records: PASS or FAIL for each figure.

    python -m harness.reproduce [runs=results/reference] [into=results/reproduced] [only=PATTERN] [output=FILE]
    python -m harness.reproduce published=results/published.csv [runs=FOLDER] [only=PATTERN] [output=FILE]

The first runs each finished record's configuration again, each in a process of its own, and compares; what ended well
is kept in `into`, so that an interrupted reproduction goes on where it was. The second runs nothing. `only` is a part
of a run's name or id, with *.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from harness.cli import table
from harness.cli.options import options_of
from harness.config.load import build_run
from harness.config.schema import LimitsConfig
from harness.records.store import Record
from harness.reports import published
from harness.reports.tolerance import EXACT_METRICS, PEAKS, SHOWN_METRICS, of_metric
from harness.reports.verdict import Figure, Report, emit
from harness.runs.isolate import execute_isolated
from harness.utils.hub import UNREACHABLE

DEFAULTS = {
    "runs": "results/reference",
    "into": "results/reproduced",
    "published": "",
    "only": "",
    "output": "",
}
_METRICS = ("perplexity", "nll", "kl", *EXACT_METRICS, *PEAKS, *SHOWN_METRICS)
_BYSTANDERS = ("commit", "platform")  # named, but what they may change shows in the sources or not at all
_console = Console(stderr=True)

Json = dict[str, Any]


def reproduce(records: Sequence[Record], into: str) -> Report:
    """Run the configuration of each record again and compare figure by figure."""
    report = Report(f"Reproduction of {len(records)} records")
    pairs = []
    for i, expected in enumerate(records):
        name = table.label(expected)
        _console.print(f"[{i + 1}/{len(records)}] {name}", markup=False, highlight=False, soft_wrap=True)
        reason = absent(expected)
        found = None if reason else execute_isolated(rerun_config(expected, into), LimitsConfig())[0]
        if found is not None and UNREACHABLE in str(found.error):
            reason = found.error
        if found is None or reason:
            report.figures.append(Figure(name, "run", None, None, note=reason or "", word="SKIP"))
        elif found.status == "failed":
            report.figures.append(Figure(name, "run", None, None, note=str(found.error), word="FAIL"))
        else:
            pairs.append((expected, found))
            report.figures += compare(expected, found)
    report.notes = _notes(pairs)
    return report


def compare(expected: Record, found: Record) -> list[Figure]:
    """The figures of a record beside those of its rerun; one that the rerun lacks fails."""
    same = repeatable(expected, found)
    name = table.label(expected)
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
    return not known and expected.run_id == found.run_id


def environment_differences(expected: Record, found: Record) -> list[tuple[str, str, str]]:
    """What the environments of two records differ in: name, recorded, here."""
    before, now = _flat(expected.environment), _flat(found.environment)
    names = list(dict.fromkeys([*before, *now]))
    return [(name, str(before.get(name)), str(now.get(name))) for name in names if before.get(name) != now.get(name)]


def rerun_config(found: Record, into: str) -> Json:
    """The configuration of a record, completed where it is older than a key, on the kind of device that it ran on."""
    raw = dict(found.config) | {"results_dir": into, "force": False, "save": None}
    raw["device"] = found.execution.get("device", raw.get("device", "auto"))
    try:
        cfg = build_run(raw)
    except (ValueError, KeyError):  # the run itself will say so, as any other's
        return raw
    raw |= {name: raw.get(name, default) for name, default in (("skip", []), ("execution", cfg.execution))}
    return raw | {name: asdict(getattr(cfg, name)) | raw.get(name, {}) for name in ("data", "engine", "measure")}


def absent(found: Record) -> str | None:
    """What a record's run needs and this machine lacks, in one line; None if nothing is known to be missing."""
    wanted = {"model.path": found.config["model"].get("path"), "data.path": found.config["data"].get("path")}
    if "calibration" in found.data:
        wanted["data.calibration_path"] = found.config["data"].get("calibration_path")
    for key, path in wanted.items():
        if path is not None and not Path(path).exists():
            return f"{key}={path} is not here; put it there, seen from {Path.cwd().name}, to compare this run"
    device = str(found.execution.get("device", "cpu"))
    if device.startswith("cuda") and not torch.cuda.is_available():
        return f"it ran on {device}, and torch {torch.__version__} sees no GPU here"
    return None


def select(records: Sequence[Record], only: str) -> list[Record]:
    """The finished records whose name or id has `only` in it.

    Raises: ValueError if there are none.
    """
    done = [found for found in records if found.status == "ok"]
    chosen = [found for found in done if fnmatch(f"{table.label(found)} {found.run_id}", f"*{only}*")]
    if not chosen:
        names = "; ".join(map(table.label, done)) or "no finished records at all"
        raise ValueError(f"only={only} is in the name of no finished record; expected a part of one of: {names}")
    return sorted(chosen, key=table.label)


def main(arguments: Sequence[str]) -> int:
    """The command line; 0 if nothing failed, 1 if something did or, with one line on stderr, cannot be read."""
    try:
        options = DEFAULTS | options_of(arguments, DEFAULTS)
        records = select(table.load(Path(options["runs"])), options["only"])
        if options["published"]:
            rows = published.read(Path(options["published"]))
            return emit(published.report(rows, records, options["only"]), options["output"])
        return emit(reproduce(records, options["into"]), options["output"])
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; finished runs are kept and will not be run again\n")
        return 130


def _notes(pairs: Sequence[tuple[Record, Record]]) -> list[str]:
    """What differs around the runs: environment, sources, texts and kernels; each once."""
    seen: dict[str, set[tuple[str, str]]] = {}
    for expected, found in pairs:
        for name, before, now in (*environment_differences(expected, found), *_circumstances(expected, found)):
            seen.setdefault(name, set()).add((before, now))
    lines = [f"{name}: {_changes(changes)}" for name, changes in seen.items()]
    if pairs and not set(seen) - {"commit"}:
        lines.append("environment: nothing else differs")
    same = sum(expected.run_id == found.run_id for expected, found in pairs)
    lines.append(f"sources and configuration: those of the record in {same} of {len(pairs)} runs")
    return lines


def _circumstances(expected: Record, found: Record) -> Iterator[tuple[str, str, str]]:
    """What differs between two runs beside the environment."""
    before, now = _identity(expected), _identity(found)
    yield from ((name, before[name], now[name]) for name in before if before[name] != now[name])


def _identity(found: Record) -> dict[str, str]:
    """What a run read and ran with, by its record."""
    return {
        "evaluation tokens": str(found.data.get("evaluation", {}).get("tokens_sha256")),
        "calibration tokens": str(found.data.get("calibration", {}).get("tokens_sha256")),
        "weights": str(found.model.get("fingerprint")),
        "kernel": str(found.execution.get("kernel")),
    }


def _changes(changes: set[tuple[str, str]]) -> str:
    return "; ".join(f"recorded {before}, here {now}" for before, now in sorted(changes))


def _note(metric: str, expected: Record, found: Record) -> str:
    if metric not in ("perplexity", "nll") or not expected.window_nll:
        return ""
    if expected.window_nll == found.window_nll:
        return "identical in every window"
    return "expected to be identical" if repeatable(expected, found) else ""


def _flat(environment: Json) -> Json:
    packages: Json = environment.get("packages", {})
    return {key: value for key, value in environment.items() if key != "packages"} | packages
