"""Executes a run, unless it has finished before, and writes its record, also if the run fails."""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from harness import models, records
from harness.config import RunConfig, build_run, changed_options
from harness.records import Record
from harness.runs import identity
from harness.runs.checks import device_of
from harness.runs.moved import moved, stamped
from harness.runs.run import run
from harness.utils.errors import LIMIT, Refusal, one_line, trace
from harness.utils.explain import cut, fitted
from harness.utils.files import first_missing, remove_empty
from harness.utils.progress import Track, silent

Json = dict[str, Any]


def execute_run(raw: Json, track: Track = silent) -> tuple[Record, bool]:
    """Run the resolved configuration `raw`, unless there is a record of the same run by the same code.

    A run whose code has changed is repeated (`stale=keep` keeps it). If the repetition gives the same bits, the earlier
    record keeps its timings and gets the new code; otherwise the new record replaces it and says which metric moved.

    A run that its configuration does not allow leaves no record and no folder: its record is `refused`.

    Returns: the record, also of a failed run, and whether the run had finished before.
    """
    record = Record(run_id=identity.early_id(raw), config=raw)
    missing = first_missing(Path(str(raw.get("results_dir"))))
    try:
        cfg = build_run(raw)
        device_of(cfg.device)
        folder = records.usable(cfg.results_dir)
        finished = _run(cfg, record, folder, track)
    except Exception as error:  # a sweep continues: every error is the result of its run
        refused = isinstance(error, Refusal)
        finished = replace(record, status="failed", error=_line(error), refused=refused), False
        trace()
    finally:
        gc.collect()
    if finished[0].refused:
        remove_empty(missing)
    elif not finished[1]:
        _store(finished[0], folder)
    return finished


def _run(cfg: RunConfig, record: Record, folder: Path, track: Track) -> tuple[Record, bool]:
    """Run the configuration of `record`, adding to it, unless there is a finished record that makes this unnecessary.

    Returns: the record to store, and whether the run had finished before.
    """
    source = models.open_quantized(cfg.model, cfg.seed) if cfg.adopts else models.open(cfg.model, cfg.seed)
    record.run_id, record.options = identity.run_id(cfg, source), changed_options(cfg)
    record.code = identity.code(cfg, device_of(cfg.device).type)
    earlier = records.finished(folder, record.run_id)
    if earlier is not None and _is_enough(earlier, record, cfg):
        return earlier, True
    record.environment = records.environment()
    torch.manual_seed(cfg.seed)
    run(cfg, source, record, track)
    if earlier is not None and not cfg.force and earlier.code != record.code:
        return _compared(earlier, record), False
    return record, False


def _is_enough(earlier: Record, now: Record, cfg: RunConfig) -> bool:
    """Whether the earlier record makes the run unnecessary."""
    return not (cfg.force or cfg.save) and (earlier.code == now.code or cfg.stale == "keep")


def _compared(earlier: Record, now: Record) -> Record:
    """The record to store after a run was repeated because its code had changed."""
    changes = moved(earlier, now)
    if not changes:
        return replace(stamped(earlier, now), unsaved=now.unsaved)
    now.warnings.append(f"repeated because its code has changed; this changed {', '.join(changes)}")
    return now


def _line(error: Exception) -> str:
    """`error` in one line. That of a user has at most `LIMIT` characters: its problem loses its end, its remedy stays.

    The parts come from different places: the engine puts the method before the reason of a model of any class name.
    """
    line = one_line(error)
    if not isinstance(error, ValueError):
        return line  # a bug is shown whole
    problem, mark, remedy = line.rpartition("; ")
    return fitted("", problem, f"{mark}{remedy}") if mark else cut(line, LIMIT)


def failed_run(raw: Json, error: str) -> Record:
    """Write the record of a run whose process died before it could write one."""
    record = Record(identity.early_id(raw), "failed", error, config=raw, environment=records.environment())
    with suppress(ValueError):  # without a folder, the error is only printed
        _store(record, records.usable(raw.get("results_dir")))
    return record


def refused_run(raw: Json, error: str) -> Record:
    """The record of a run that its configuration does not allow; it is not written."""
    return Record(identity.early_id(raw), "failed", error, refused=True, config=raw)


def _store(record: Record, folder: Path) -> None:
    """Write a record. If this fails, write it into a temporary folder, and turn `record` into a failed one.

    The record of an early failure of the same run is removed once the run has succeeded.
    """
    try:
        records.write(record, folder)
        if record.status == "ok":
            records.path_of(folder, identity.early_id(record.config)).unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # a full disk, or a number that JSON does not have
        file = records.rescue(record)
        rescued = f"it was written to {file} instead, free space and move it" if file else "it is lost, free space"
        record.status = "failed"
        record.error = f"results_dir={folder}: the record cannot be written ({error}); {rescued} or name another folder"
