"""Run committed records again, or compare records with published tables: PASS or FAIL for each figure.

    python -m harness reproduce [KEY=VALUE ...]
    python -m harness reproduce published=results/published.csv [KEY=VALUE ...]

The first form runs the configuration of each finished record again, each in a separate process, and compares. If only
the code has changed and the results are the same bits, the record gets the code of the rerun, and tables no longer mark
it. Finished reruns are kept in `into`, so that an interrupted reproduction can be continued. The second form runs
nothing. `only` is a part of a run's name or id, and may contain *.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from harness.cli.commands import REPRODUCE, run_command
from harness.config import LimitsConfig, build_run
from harness.records import Record, load_records, runs_of, write
from harness.reports import Figure, Report, label, published, reproduction
from harness.reports.verdict import Word, emit
from harness.runs import execute_isolated, moved, stamped
from harness.utils.hub import UNREACHABLE

_console = Console(stderr=True)

Json = dict[str, Any]


def reproduce(expected: Sequence[Record], folder: Path, into: str) -> Report:
    """Run the configuration of each record of `folder` again, and compare all figures; reruns are stored in `into`.

    A record whose rerun gave the same bits with other code gets the code of the rerun.
    """
    report = Report(f"Reproduction of {len(expected)} records")
    pairs = []
    for i, record in enumerate(expected):
        _console.print(f"[{i + 1}/{len(expected)}] {label(record)}", markup=False, highlight=False, soft_wrap=True)
        rerun = _rerun(record, into)
        if isinstance(rerun, Figure):
            report.figures.append(rerun)
        else:
            pairs.append((record, rerun))
            report.figures += reproduction.compare(record, rerun)
    confirmed = [_confirm(record, rerun, folder) for record, rerun in pairs]
    report.notes = reproduction.notes(pairs)
    if any(confirmed):
        report.notes.append(f"{sum(confirmed)} records gave the same bits with other code; their code is updated to it")
    return report


def _rerun(record: Record, into: str) -> Record | Figure:
    """The record of a new run of the same configuration; if it cannot run or fails, a figure with the reason."""
    reason = absent(record)
    if reason:
        return Figure(label(record), "run", None, None, note=reason, word="SKIP")
    rerun, _ = execute_isolated(rerun_config(record, into), LimitsConfig())
    if rerun.status == "ok":
        return rerun
    word: Word = "SKIP" if UNREACHABLE in str(rerun.error) else "FAIL"
    return Figure(label(record), "run", None, None, note=str(rerun.error), word=word)


def _confirm(record: Record, rerun: Record, folder: Path) -> bool:
    """Give a record the code of its rerun if only the code differs, and not the results; returns whether it did."""
    if record.code == rerun.code or record.run_id != rerun.run_id or moved(record, rerun):
        return False
    write(stamped(record, rerun), folder)
    return True


def rerun_config(record: Record, into: str) -> Json:
    """The configuration of a record, for the device that it ran on; keys that are newer than the record are added."""
    raw = dict(record.config) | {"results_dir": into, "force": False, "save": None}
    raw["device"] = record.execution.device or raw.get("device", "auto")
    try:
        cfg = build_run(raw)
    except (ValueError, KeyError):  # the run will fail with this error
        return raw
    raw |= {name: raw.get(name, default) for name, default in (("skip", []), ("execution", cfg.execution))}
    return raw | {name: asdict(getattr(cfg, name)) | raw.get(name, {}) for name in ("data", "engine", "measure")}


def absent(record: Record) -> str | None:
    """A file or device that the run of a record needs and that is missing here, in one line; None if there is none."""
    paths = {"model.path": record.config["model"].get("path"), "data.path": record.config["data"].get("path")}
    if record.data.calibration is not None:
        paths["data.calibration_path"] = record.config["data"].get("calibration_path")
    for key, path in paths.items():
        if path is not None and not Path(path).exists():
            return f"{key}={path} does not exist, seen from {Path.cwd().name}; put it there to compare this run"
    device = record.execution.device or "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        return f"the record is from {device}, and torch {torch.__version__} finds no GPU here"
    return None


def select(candidates: Sequence[Record], only: str) -> list[Record]:
    """The finished records whose name or id contains the pattern `only`.

    Raises: ValueError if there are none.
    """
    finished = [record for record in candidates if record.status == "ok"]
    chosen = [record for record in finished if fnmatch(f"{label(record)} {record.run_id}", f"*{only}*")]
    if not chosen:
        names = "; ".join(map(label, finished)) or "no finished records at all"
        raise ValueError(f"only={only} matches no finished record; expected a part of one of: {names}")
    return sorted(chosen, key=label)


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Returns: the exit code: 0 if no figure failed, 130 after an interruption, otherwise 1. An error is one line.
    """
    return run_command(REPRODUCE, arguments, _run)


def _run(options: dict[str, str]) -> int:
    folder = Path(options["runs"])
    chosen = select(load_records(folder), options["only"])
    if options["published"]:
        rows = published.read(Path(options["published"]))
        return emit(published.report(rows, chosen, options["only"]), options["output"])
    return emit(reproduce(chosen, runs_of(folder), options["into"]), options["output"])
