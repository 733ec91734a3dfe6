"""Runs and sweeps: starts them, shows their progress, and prints their table."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness.cli.hydra_errors import one_line
from harness.cli.main import conf_folder
from harness.config import build_limits
from harness.records import Record, headline, load_records, path_of, read, sweep
from harness.reports import label, show, to_frame
from harness.runs import execute_isolated, execute_run, failed_run, stale_ids
from harness.utils.progress import Label, text

T = TypeVar("T")

CONF = conf_folder()
_console = Console(stderr=True)
_TRACEBACK = "PTQBENCH_TRACEBACK"  # environment variable that tells every process of a sweep to print tracebacks


def main() -> int:
    """Start the runs of the command line and print their table.

    Returns: the exit code: 0 if all runs finished without an error, 130 after an interruption, otherwise 1.
    """
    show_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    os.environ[_TRACEBACK] = "1" if show_traceback else ""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises instead of printing
    _ended.clear()
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except Exception as error:  # runs catch their errors, so Hydra could not read the command line
        if show_traceback:
            raise
        _fail(one_line(error))
        return 1
    except KeyboardInterrupt:
        _fail("interrupted; finished runs are kept and will be skipped next time")
        return 130
    return 1 if "failed" in _ended else 0


_ended: list[str] = []  # status of each run, for the exit code: Hydra does not return results of runs


def job(cfg: DictConfig) -> list[float] | None:
    """One run: Hydra's launchers call this function, in this process or in another.

    Returns: the metrics in `objectives`; None if there are none, or one was not measured.
    """
    context = HydraConfig.get()
    sweeping = context.mode == RunMode.MULTIRUN
    start = time.perf_counter()
    try:
        raw = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        _fail(one_line(error))
        if sweeping:
            sweep.note(Path(context.sweep.dir), sweep.Entry(context.job.num, None, "failed", 0.0))
        else:
            _ended.append("failed")
        return None
    record, skipped = _execute(raw, sweeping)
    _report(record, skipped)
    if sweeping:
        entry = sweep.entry_of(context.job.num, record, skipped, time.perf_counter() - start)
        sweep.note(Path(context.sweep.dir), entry)
    else:
        _ended.append(record.status)
        if record.status == "ok":
            _show_table([record])
    return _objectives(record)


def _execute(raw: dict[str, Any], sweeping: bool) -> tuple[Record, bool]:
    """Execute the run in this process or in a separate one, as `isolate` says.

    Returns: its record, and whether the run had finished before.
    """
    show_traceback = bool(os.environ.get(_TRACEBACK))
    try:
        limits = build_limits(raw, sweeping)
    except ValueError as error:
        return failed_run(raw, one_line(error)), False
    if limits is None:
        return execute_run(raw, _track, show_traceback)
    return execute_isolated(raw, limits, _track, show_traceback)


def _objectives(record: Record) -> list[float] | None:
    """The metrics that a sweeper optimizes; None, which is a failed trial, if one of them was not measured."""
    names = record.config.get("objectives") or []
    measured = record.status == "ok" and all(name in record.metrics for name in names)
    return [record.metrics[name] for name in names] if measured and names else None


class SweepEnd(Callback):
    """Hydra's callback in the process that started a sweep: at the end it prints a table and a summary."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Summarize the entries that the processes of all runs have written."""
        folder = Path(config.hydra.sweep.dir)
        entries = sweep.entries(folder)
        _ended.extend(entry.status for entry in entries)
        summary = sweep.summary(entries, time.perf_counter() - self.start)
        if any(entry.run_id for entry in entries):
            _show_table(_records(Path(config.results_dir), entries))
        _console.print(
            f"{summary['runs']} runs, {summary['failed']} failed, {summary['skipped']} skipped in "
            f"{summary['wall_s']:.0f} s; the harness's own share of the time is {summary['own_share']:.1%}; "
            f"{sweep.write_summary(folder, summary)}",
            highlight=False,
            soft_wrap=True,
        )


def _records(folder: Path, entries: Sequence[sweep.Entry]) -> list[Record]:
    """The records of the runs of a sweep; a record that cannot be read is reported and left out."""
    readable = []
    for run_id in dict.fromkeys(entry.run_id for entry in entries if entry.run_id):
        try:
            readable.append(read(path_of(folder, run_id)))
        except ValueError as error:
            _fail(str(error))
    return readable


def _track(items: Iterable[T], label: Label, total: int | None = None) -> Generator[T, None, None]:
    """A Track that shows a progress bar with the remaining time on a terminal, and nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console, transient=True, disable=not _console.is_terminal) as progress:
        task = progress.add_task(text(label), total=total)
        for item in items:
            yield item
            progress.update(task, advance=1, description=text(label))


def _report(record: Record, skipped: bool) -> None:
    """Print the result of a run in one line, and its warnings."""
    name = escape(label(record))
    if skipped:
        _console.print(
            f"[dim]skip[/]  {name}: finished before as {record.run_id}; force=true repeats it", soft_wrap=True
        )
        return
    for warning in record.warnings:
        _console.print(f"[yellow]warn[/]  {name}: {escape(warning)}", highlight=False, soft_wrap=True)
    if record.status == "failed":
        _fail(f"{label(record)}: {record.error}")
    else:
        metric = headline(record.metrics)
        figure = f"{metric} {record.metrics[metric]:.4g} in " if metric else ""
        seconds = sum(record.stages.values())
        _console.print(f"[green]done[/]  {name}: {figure}{seconds:.1f} s", highlight=False, soft_wrap=True)


def _show_table(records: Sequence[Record]) -> None:
    """Print the table of these runs; its float baselines may be results of earlier commands."""
    folder = Path(str(records[0].config["results_dir"]))
    others = load_records(folder) if folder.is_dir() else ()
    show(to_frame(records, others, stale_ids(records)))


def _fail(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
