"""Sweeps: all configurations are checked before the first run, and a table and a summary are printed at the end."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from harness.cli.base import find_base
from harness.cli.commands import print_error
from harness.cli.hydra_errors import one_line
from harness.cli.show import show_table
from harness.cli.start import Stop, ended, on_interrupt
from harness.config import build_limits, build_run
from harness.records import Record, path_of, read, sweep, write
from harness.utils.errors import Conflict, Refusal, short
from harness.utils.files import first_missing, remove_empty

_RUNS = "PTQBENCH_SWEEP_RUNS"  # environment variable: number of runs, for the processes of all launchers
_ORDERED = "PTQBENCH_SWEEP_ORDERED"  # environment variable: whether one run follows another
_UNEQUAL = 2.0  # a run that takes this many times the median is unlike the others
_console = Console(stderr=True)

Json = dict[str, Any]


class SweepEnd(Callback):
    """Hydra's callback in the process that starts a sweep: checks it before, and sums it up at the end."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.remove: Callable[[], None] = lambda: None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check every run before the first; a sweep that cannot start has written nothing.

        Raises: Stop if the configuration of a run has a mistake, or none of the runs is possible.
        """
        jobs = jobs_of(config)
        check(config, jobs)
        known = len(jobs) if jobs is not None else OmegaConf.select(config, "hydra.sweeper.n_trials")
        os.environ[_RUNS] = str(known or "")
        os.environ[_ORDERED] = "1" if config.hydra.launcher._target_.endswith(".BasicLauncher") else ""
        folder = Path(str(config.hydra.sweep.dir))
        self.remove = partial(remove_unused, folder, first_missing(folder))
        on_interrupt.append(self.remove)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Summarize the entries that the processes of all runs have written."""
        folder, results = Path(config.hydra.sweep.dir), Path(config.results_dir)
        entries = sweep.entries(folder)
        ended.extend(entry.status for entry in entries)
        if entries and all(entry.refused for entry in entries):
            self.remove()
            print_error(f"none of the {len(entries)} runs is possible; nothing was written")
            return
        for entry in entries:
            if entry.refused and entry.run_id:
                write(read(path_of(folder, entry.run_id)), results)
                path_of(folder, entry.run_id).unlink()
        summary = sweep.summary(entries, time.perf_counter() - self.start)
        if any(entry.run_id for entry in entries):
            show_table(_records(results, entries))
        _console.print(
            f"{summary['runs']} runs, {summary['failed']} failed, {summary['skipped']} skipped in "
            f"{duration(summary['wall_s'])}; the harness's own share of the time is {summary['own_share']:.1%}; "
            f"{sweep.write_summary(folder, summary)}",
            highlight=False,
            soft_wrap=True,
        )


def remove_unused(folder: Path, missing: Path | None) -> None:
    """Remove the folder of a sweep that has no finished run, and `missing`, the folders that were created for it."""
    if any(not entry.refused for entry in sweep.entries(folder)):
        return
    for path in folder.glob("*"):
        if path.is_file():
            path.unlink()
    remove_empty(folder)
    remove_empty(missing)


def jobs_of(config: DictConfig) -> list[list[str]] | None:
    """The overrides of each run of a sweep; None for a sweeper that chooses them as it goes, such as Optuna's."""
    sweeper, parser = config.hydra.sweeper, OverridesParser.create(GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides(list(config.hydra.overrides.task))
    if sweeper._target_.endswith(".BasicSweeper"):
        params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        lines: Sequence[list[Override]] = [parser.parse_overrides(params)]
    elif sweeper._target_.endswith(".UnionSweeper"):
        lines = [parser.parse_overrides(line.split()) for line in sweeper.sweeps]
    else:
        return None
    return [
        job for line in lines for (jobs,) in [BasicSweeper.split_arguments([*line, *overrides], None)] for job in jobs
    ]


def check(config: DictConfig, jobs: Sequence[Sequence[str]] | None) -> None:
    """Check the configurations of all runs, or only what they share if the runs are not known.

    Raises: Stop, in one line, if a run has a key or value that no run can have, or if no run is possible.
    """
    refusals: list[tuple[Sequence[str], Refusal]] = []
    shared = jobs is None
    for job in [_fixed(config)] if jobs is None else jobs:
        try:
            _build(config, job)
        except Refusal as error:
            refusals.append((job, error))
        except Exception as error:  # Hydra cannot compose it
            refusals.append((job, Refusal(one_line(error, tuple(job)))))
    everywhere = set.intersection(*(set(job) for job in jobs)) if jobs else set[str]()
    refusals = [([part for part in job if part not in everywhere], error) for job, error in refusals]
    fatal = [(job, error) for job, error in refusals if not isinstance(error, Conflict)]
    if fatal:
        raise Stop(_message(*fatal[0], len(fatal), 0 if shared else len(jobs or ())))
    if jobs and len(refusals) == len(jobs):
        raise Stop(_message(*refusals[0], len(refusals), len(jobs)))


def _build(config: DictConfig, job: Sequence[str]) -> None:
    """Compose and build the typed configuration of a run, and nothing else."""
    cfg = GlobalHydra.instance().config_loader().load_sweep_config(config, list(job))
    values = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    raw = cast(Json, OmegaConf.to_container(values, resolve=True))
    find_base(raw)
    build_limits(raw, True)
    build_run(raw)


def _fixed(config: DictConfig) -> list[str]:
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides(list(config.hydra.overrides.task))
    return [override.input_line or "" for override in overrides if not override.is_sweep_override()]


def _message(job: Sequence[str], error: Refusal, count: int, total: int) -> str:
    place = f" ({count} of {total} runs: {short(' '.join(job), 50)})" if total > 1 else ""
    return f"{error}{place}; nothing was run"


def refuse(folder: Path, number: int, record: Record, wall_s: float) -> None:
    """Note a run that is not possible; its record is written at the end, if another run of the sweep was possible."""
    write(record, folder)
    sweep.note(folder, sweep.entry_of(number, record, False, wall_s))


def place(number: int) -> str:
    """Which run of the sweep the run `number`, from 0, is: "run 2 of 4"."""
    total = os.environ.get(_RUNS)
    return f"run {number + 1} of {total}" if total else f"run {number + 1}"


def time_left(folder: Path, number: int) -> str:
    """How long the sweep still takes before run `number` starts, from the runs that finished; empty if that is unknown.

    The estimate is the median of finished runs for each of the others; if these took unequal times, it says so.
    """
    total = os.environ.get(_RUNS)
    if not total or not os.environ.get(_ORDERED):
        return ""
    walls = [entry.wall_s for entry in sweep.entries(folder) if not entry.skipped and not entry.refused]
    if not walls:
        return ""
    median = statistics.median(walls)
    unequal = max(walls) > _UNEQUAL * median or min(walls) * _UNEQUAL < median
    basis = f"runs took {duration(min(walls))} to {duration(max(walls))}" if unequal else f"from {len(walls)} finished"
    return f"about {duration(median * (int(total) - number))} left ({basis})"


def duration(seconds: float) -> str:
    """Seconds in the unit that a reader expects: 12 s, 3 min, 1.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _records(folder: Path, entries: Sequence[sweep.Entry]) -> list[Record]:
    """The records of the runs of a sweep; a record that cannot be read is reported and left out."""
    readable = []
    for run_id in dict.fromkeys(entry.run_id for entry in entries if entry.run_id):
        try:
            readable.append(read(path_of(folder, run_id)))
        except ValueError as error:
            print_error(error)
    return readable
