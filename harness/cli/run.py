"""One run of the command line or of a sweep: executes it, shows its progress, and prints its result."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness.cli import sweeps
from harness.cli.base import find_base
from harness.cli.commands import print_error
from harness.cli.hydra_errors import one_line
from harness.cli.show import show_table
from harness.cli.start import ended
from harness.config import build_limits, one_source
from harness.records import Record, headline, sweep
from harness.reports import label
from harness.runs import execute_isolated, execute_run, refused_run
from harness.utils.errors import Refusal
from harness.utils.progress import Label, Track, text

T = TypeVar("T")

_console = Console(stderr=True)


def job(cfg: DictConfig) -> list[float] | None:
    """One run: `harness.cli.start.job` calls this function, in this process or in that of a launcher.

    Returns: the metrics in `objectives`; None if there are none, or one was not measured.
    """
    context = HydraConfig.get()
    number = context.job.num if context.mode == RunMode.MULTIRUN else None
    folder = Path(str(context.sweep.dir))
    start = time.perf_counter()
    try:
        raw = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
        _use_typed_source(raw, context.overrides.task)
        find_base(raw)
    except (OmegaConfBaseException, ValueError) as error:
        print_error(one_line(error))
        ended.append("failed")
        return None
    record, skipped = _execute(raw, number, folder)
    _report(record, skipped, "" if number is None else f" ({sweeps.place(number)})")
    wall_s = time.perf_counter() - start
    if number is None:
        ended.append(sweep.outcome(record, skipped))
        if record.status == "ok":
            show_table([record])
    elif record.refused:
        sweeps.refuse(folder, number, record, wall_s)
    else:
        sweep.note(folder, sweep.entry_of(number, record, skipped, wall_s))
    return _objectives(record)


def _use_typed_source(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Change the section `model` of `raw` so that an id or a package on the command line replaces the axis's source.

    Raises: ValueError if the command line has several sources of weights.
    """
    prefix = "model."
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    typed = {key.removeprefix(prefix).partition(".")[0] for key in keys if key.startswith(prefix)}
    if isinstance(raw.get("model"), dict):
        section = one_source(raw["model"], typed)
        if "path" not in typed:  # a record keeps the axis's name for a folder: it is a copy of this model
            raw["model"] = section


def _execute(raw: dict[str, Any], number: int | None, folder: Path) -> tuple[Record, bool]:
    """Execute the run in this process or in a separate one, as `isolate` says; `number` is its place in a sweep.

    Returns: its record, and whether the run had finished before.
    """
    try:
        limits = build_limits(raw, number is not None)
    except Refusal as error:
        return refused_run(raw, str(error)), False
    place = "" if number is None else sweeps.place(number)
    left = "" if number is None else sweeps.time_left(folder, number)
    track = _tracker(", ".join(part for part in (place, left) if part))
    if limits is None:
        return execute_run(raw, track)
    return execute_isolated(raw, limits, track)


def _objectives(record: Record) -> list[float] | None:
    """The metrics that a sweeper optimizes; None, which is a failed trial, if one of them was not measured."""
    objectives = record.config.get("objectives") or []
    names = [objectives] if isinstance(objectives, str) else objectives
    measured = record.status == "ok" and all(name in record.metrics for name in names)
    return [record.metrics[name] for name in names] if measured and names else None


def _tracker(head: str) -> Track:
    """A Track that shows a progress bar with the remaining time on a terminal; elsewhere one line that begins the run.

    `head` says which run of a sweep it is, and how long the others take; it is empty for a single run.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    prefix = f"[{head}] " if head else ""
    if head and not _console.is_terminal:
        _console.print(f"{head} ...", markup=False, highlight=False, soft_wrap=True)

    def track(items: Iterable[T], label: Label, total: int | None = None) -> Generator[T, None, None]:
        with Progress(*columns, console=_console, transient=True, disable=not _console.is_terminal) as progress:
            task = progress.add_task(escape(prefix + text(label)), total=total)
            for item in items:
                yield item
                progress.update(task, advance=1, description=escape(prefix + text(label)))

    return track


def _report(record: Record, skipped: bool, place: str) -> None:
    """Print the result of a run in one line, and its warnings; `place` says which run of a sweep it is."""
    name = escape(label(record))
    if skipped:
        _console.print(
            f"[dim]skip[/]  {name}: finished before as {record.run_id}; force=true repeats it{place}", soft_wrap=True
        )
        return
    for warning in record.warnings:
        _console.print(f"[yellow]warn[/]  {name}: {escape(warning)}", highlight=False, soft_wrap=True)
    if record.refused and not place:
        print_error(str(record.error))
    elif record.status == "failed":
        print_error(f"{label(record)}: {record.error}")
    else:
        metric = headline(record.metrics)
        figure = f"{metric} {record.metrics[metric]:.4g} in " if metric else ""
        seconds = sum(record.stages.values())
        _console.print(f"[green]done[/]  {name}: {figure}{seconds:.1f} s{place}", highlight=False, soft_wrap=True)
    if record.unsaved:
        print_error(f"{label(record)}: the model was not saved: {record.unsaved}")
