"""Carries out a run unless its record is there already, and writes the record, also of a run that failed."""

from __future__ import annotations

import gc
import traceback
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
from harness.utils.errors import one_line
from harness.utils.progress import Track, silent

Json = dict[str, Any]


def execute_run(raw: Json, track: Track = silent, show_traceback: bool = False) -> tuple[Record, bool]:
    """Run what `raw`, the resolved configuration, says, unless a record of it by the same code is there already.

    A run of other code is repeated (`stale=keep` keeps it). If the repetition gives the same bits, the earlier record
    keeps its timings and takes the new code; otherwise the new record replaces it and says which metric moved.

    Returns: the record, failed ones included, and whether it was there already.
    """
    result = Record(run_id=identity.early_id(raw), config=raw)
    try:
        folder = records.usable(raw.get("results_dir"))
    except ValueError as error:
        result.status, result.error = "failed", one_line(error)
        return result, False
    before: Record | None = None
    try:
        cfg = build_run(raw)
        source = models.open(cfg.model, cfg.seed)
        result.run_id, result.options = identity.run_id(cfg, source), changed_options(cfg)
        result.code = identity.code(cfg, device_of(cfg.device).type)
        before = records.finished(folder, result.run_id)
        if before is not None and _is_enough(before, result, cfg):
            return before, True
        result.environment = records.environment()
        torch.manual_seed(cfg.seed)
        run(cfg, source, result, track)
        if before is not None and not cfg.force and before.code != result.code:
            result = _compared(before, result)
    except Exception as error:  # a sweep continues: every error is the result of its run
        result = replace(result, status="failed", error=one_line(error))
        if show_traceback:
            traceback.print_exc()
    finally:
        gc.collect()
    _keep(result, folder)
    return result, False


def _is_enough(before: Record, now: Record, cfg: RunConfig) -> bool:
    """Whether a finished record makes the run unnecessary."""
    return not (cfg.force or cfg.save) and (before.code == now.code or cfg.stale == "keep")


def _compared(before: Record, now: Record) -> Record:
    """The record to keep of a run that was repeated by other code."""
    changes = moved(before, now)
    if not changes:
        return stamped(before, now)
    now.warnings.append(f"run again by other code, which moved {', '.join(changes)}")
    return now


def failed_run(raw: Json, error: str) -> Record:
    """Write the record of a run whose process could not do it."""
    result = Record(identity.early_id(raw), "failed", error, config=raw, environment=records.environment())
    with suppress(ValueError):  # without a folder, the line on the screen is all there is
        _keep(result, records.usable(raw.get("results_dir")))
    return result


def _keep(result: Record, folder: Path) -> None:
    """Write a record, elsewhere if its folder has no room; an early failure of the same run is removed."""
    try:
        records.write(result, folder)
        if result.status == "ok":
            records.path_of(folder, identity.early_id(result.config)).unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # a full disk; a figure that JSON cannot hold
        place = records.rescue(result)
        saved = f"it is kept as {place}, move it there" if place else "it is lost"
        result.status = "failed"
        result.error = (
            f"results_dir={folder}: the record cannot be written ({error}); {saved}, free space or name another folder"
        )
