"""The command line: starts runs and sweeps, shows their progress, and prints their table."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness import record, table
from harness.errors import one_line
from harness.progress import Label, text
from harness.run import execute

T = TypeVar("T")

CONF = Path(__file__).parent.parent / "conf"
_console = Console(stderr=True)


def main() -> int:
    """Start the runs that the command line asks for and print their table; 0 if every one ended well."""
    shown: list[record.Record] = []
    unread: list[str] = []
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(cfg: DictConfig) -> None:
        try:
            raw = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
        except OmegaConfBaseException as error:
            unread.append(one_line(error))
            return
        found, skipped = execute(raw, _track, wants_traceback)
        _report(found, skipped)
        shown.append(found)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises instead of printing; told apart by wants_traceback
    try:
        job()
    except Exception as error:  # runs catch their own: this is a command line that Hydra cannot read
        if wants_traceback:
            raise
        _fail(one_line(error))
        return 1
    except KeyboardInterrupt:
        _fail("interrupted; finished runs are kept and will be skipped next time")
        return 130
    for message in unread:
        _fail(message)
    if any(found.status == "ok" for found in shown):
        _show_table(shown)
    return 1 if unread or any(found.status == "failed" for found in shown) else 0


def _track(items: Iterable[T], label: Label, total: int | None = None) -> Generator[T, None, None]:
    """A progress bar with the time left on a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console, transient=True, disable=not _console.is_terminal) as progress:
        task = progress.add_task(text(label), total=total)
        for item in items:
            yield item
            progress.update(task, advance=1, description=text(label))


def _report(found: record.Record, skipped: bool) -> None:
    label = escape(table.label(found))
    if skipped:
        _console.print(
            f"[dim]skip[/]  {label}: finished before as {found.run_id}; force=true repeats it", soft_wrap=True
        )
        return
    for warning in found.warnings:
        _console.print(f"[yellow]warn[/]  {label}: {escape(warning)}", highlight=False, soft_wrap=True)
    if found.status == "failed":
        _fail(f"{table.label(found)}: {found.error}")
    else:
        shown = next((name for name in ("perplexity", "nll", "decode_ms_p50") if name in found.metrics), "")
        figure = f"{shown} {found.metrics[shown]:.4g} in " if shown else ""
        seconds = sum(found.stages.values())
        _console.print(f"[green]done[/]  {label}: {figure}{seconds:.1f} s", highlight=False, soft_wrap=True)


def _show_table(shown: list[record.Record]) -> None:
    """The table of these runs, with ratios to float baselines that may be from an earlier command."""
    folder = Path(str(shown[0].config["results_dir"]))
    frame = table.to_frame([*shown, *(table.load(folder) if folder.is_dir() else ())])
    table.show(frame[frame["run_id"].isin([found.run_id for found in shown])])


def _fail(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
