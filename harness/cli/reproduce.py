"""Reruns of committed records, and published tables compared with records: PASS or FAIL for each figure.

    python -m harness reproduce [runs=results/reference] [into=results/reproduced] [only=PATTERN] [output=FILE]
    python -m harness reproduce published=results/published.csv [runs=FOLDER] [only=PATTERN] [output=FILE]

The first runs the configuration of each finished record again, each in a process of its own, and compares. A record
whose rerun gave the same bits takes the code of the rerun, and is no longer marked in tables. Finished reruns are kept
in `into`, so that an interrupted reproduction continues where it was. The second runs nothing. `only` is a part of a
run's name or id, with *.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from harness import records
from harness.cli.options import options_of
from harness.config import LimitsConfig, build_run
from harness.records import Record
from harness.records.folder import load_records, runs_of
from harness.reports import published
from harness.reports.describe import label
from harness.reports.reproduction import compare, notes
from harness.reports.verdict import Figure, Report, emit
from harness.runs import execute_isolated, moved, stamped
from harness.utils.hub import UNREACHABLE

DEFAULTS = {
    "runs": "results/reference",
    "into": "results/reproduced",
    "published": "",
    "only": "",
    "output": "",
}
_console = Console(stderr=True)

Json = dict[str, Any]


def reproduce(expected: Sequence[Record], folder: Path, into: str) -> Report:
    """Run the configuration of each record of `folder` again and compare figure by figure.

    A record whose rerun gave the same bits is stamped with the code of the rerun.
    """
    report = Report(f"Reproduction of {len(expected)} records")
    pairs = []
    for i, record in enumerate(expected):
        name = label(record)
        _console.print(f"[{i + 1}/{len(expected)}] {name}", markup=False, highlight=False, soft_wrap=True)
        reason = absent(record)
        rerun = None if reason else execute_isolated(rerun_config(record, into), LimitsConfig())[0]
        if rerun is not None and UNREACHABLE in str(rerun.error):
            reason = rerun.error
        if rerun is None or reason:
            report.figures.append(Figure(name, "run", None, None, note=reason or "", word="SKIP"))
        elif rerun.status == "failed":
            report.figures.append(Figure(name, "run", None, None, note=str(rerun.error), word="FAIL"))
        else:
            pairs.append((record, rerun))
            report.figures += compare(record, rerun)
    confirmed = [_confirm(record, rerun, folder) for record, rerun in pairs]
    report.notes = notes(pairs)
    if any(confirmed):
        report.notes.append(
            f"{sum(confirmed)} records gave the same bits by other code, which they are stamped with now"
        )
    return report


def _confirm(record: Record, rerun: Record, folder: Path) -> bool:
    """Stamp a record of other code whose rerun gave the same bits; whether it was one."""
    if record.code == rerun.code or record.run_id != rerun.run_id or moved(record, rerun):
        return False
    records.write(stamped(record, rerun), folder)
    return True


def rerun_config(record: Record, into: str) -> Json:
    """The configuration of a record, completed where it is older than a key, on the kind of device that it ran on."""
    raw = dict(record.config) | {"results_dir": into, "force": False, "save": None}
    raw["device"] = record.execution.device or raw.get("device", "auto")
    try:
        cfg = build_run(raw)
    except (ValueError, KeyError):  # the run itself will say so, as any other's
        return raw
    raw |= {name: raw.get(name, default) for name, default in (("skip", []), ("execution", cfg.execution))}
    return raw | {name: asdict(getattr(cfg, name)) | raw.get(name, {}) for name in ("data", "engine", "measure")}


def absent(record: Record) -> str | None:
    """What a record's run needs and this machine lacks, in one line; None if nothing is known to be missing."""
    paths = {"model.path": record.config["model"].get("path"), "data.path": record.config["data"].get("path")}
    if record.data.calibration is not None:
        paths["data.calibration_path"] = record.config["data"].get("calibration_path")
    for key, path in paths.items():
        if path is not None and not Path(path).exists():
            return f"{key}={path} is not here; put it there, seen from {Path.cwd().name}, to compare this run"
    device = record.execution.device or "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        return f"it ran on {device}, and torch {torch.__version__} sees no GPU here"
    return None


def select(candidates: Sequence[Record], only: str) -> list[Record]:
    """The finished records whose name or id has `only` in it.

    Raises: ValueError if there are none.
    """
    done = [record for record in candidates if record.status == "ok"]
    chosen = [record for record in done if fnmatch(f"{label(record)} {record.run_id}", f"*{only}*")]
    if not chosen:
        names = "; ".join(map(label, done)) or "no finished records at all"
        raise ValueError(f"only={only} is in the name of no finished record; expected a part of one of: {names}")
    return sorted(chosen, key=label)


def main(arguments: Sequence[str]) -> int:
    """The command line; 0 if nothing failed, 1 if something did or, with one line on stderr, cannot be read."""
    try:
        options = DEFAULTS | options_of(arguments, DEFAULTS)
        folder = Path(options["runs"])
        chosen = select(load_records(folder), options["only"])
        if options["published"]:
            rows = published.read(Path(options["published"]))
            return emit(published.report(rows, chosen, options["only"]), options["output"])
        return emit(reproduce(chosen, runs_of(folder), options["into"]), options["output"])
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; finished runs are kept and will not be run again\n")
        return 130
