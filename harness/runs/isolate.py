"""A run in a process of its own, so that whatever ends it, out of memory included, is a row with its reason.

The process is forked from a server that has imported what every run needs and done nothing else: no threads, no
memory of other runs, no second start of the libraries. Where the sweep that waits for it is killed, it ends too.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil

from harness.config import LimitsConfig
from harness.records import Record
from harness.runs.execute import execute_run, failed_run
from harness.utils.progress import Label, Track, silent, text

Json = dict[str, Any]
T = TypeVar("T")

_PRELOADED = ["harness.runs.preload"]
_LOOK_S = 0.05  # how often limits are looked at
_GIB = 2**30
_FIRST_TO_GO = "900"  # of 1000: where memory runs out, the system ends the run and not the sweep


class Place(NamedTuple):
    """Where a run is: the server that its process comes from may have been started elsewhere."""

    folder: str
    environment: dict[str, str]


def execute_isolated(
    raw: Json, limits: LimitsConfig, track: Track = silent, show_traceback: bool = False
) -> tuple[Record, bool]:
    """As `execute_run`, in a new process that ends once it exceeds `limits`.

    Returns: the record, and whether it was there already. A process that dies leaves a failed record that says how.
    """
    known = (None, *multiprocessing.get_all_start_methods())
    if multiprocessing.get_start_method(allow_none=True) not in known:  # joblib's, which a new process would not know
        multiprocessing.set_start_method("forkserver", force=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    events, its_events = context.Pipe(duplex=False)
    its_life, life = context.Pipe(duplex=False)
    place = Place(os.getcwd(), dict(os.environ))  # noqa: PTH109 - a string goes to the other process
    process = context.Process(target=_work, args=(its_events, its_life, place, raw, show_traceback))
    process.start()
    its_events.close()
    its_life.close()
    watch = _Watch(process.pid or 0, limits, track)
    try:
        done = watch.follow(events)
    finally:
        process.kill()  # nothing is left of it, whatever happened here
        process.join()
        life.close()
        events.close()
    if done is not None:
        return done
    return failed_run(raw, watch.reason or _died(process.exitcode, watch)), False


@dataclass
class _Watch:
    """Follows a process: its progress, its memory and its time.

    reason  why it was ended, if it was ended here
    doing   what it said last
    """

    pid: int
    limits: LimitsConfig
    track: Track
    reason: str = ""
    doing: str = "start"
    resident: int = 0
    started: float = field(default_factory=time.monotonic)

    def follow(self, events: Connection) -> tuple[Record, bool] | None:
        """What the process says in the end; None if it died or was ended."""
        bars: list[Generator[int, None, None]] = []
        try:
            while not self.reason:
                if not events.poll(_LOOK_S):
                    self._look()
                    continue
                kind, *said = events.recv()
                if kind == "done":
                    return said[0], said[1]
                self._show(bars, kind, *said)
                self._look()
        except (EOFError, ConnectionError):
            pass
        finally:
            for bar in reversed(bars):
                bar.close()
        return None

    def _show(
        self, bars: list[Generator[int, None, None]], kind: str, label: str = "", total: int | None = None
    ) -> None:
        self.doing = label or self.doing
        if kind == "begin":
            bars.append(self.track(count(), lambda: self.doing, total))
        if kind == "end":
            bars.pop().close()
        else:
            next(bars[-1])

    def _look(self) -> None:
        with suppress(psutil.Error):  # it may be gone
            self.resident = psutil.Process(self.pid).memory_info().rss or self.resident  # 0 of one that has just died
        seconds, most = time.monotonic() - self.started, self.limits
        if most.memory_gib is not None and self.resident > most.memory_gib * _GIB:
            self.reason = (
                f"limits.memory_gib={most.memory_gib:g} is exceeded: {self.resident / _GIB:.2f} GiB were resident "
                f"during {self.doing}; raise the limit, or use a smaller model, batch or calibration"
            )
        elif most.time_s is not None and seconds > most.time_s:
            self.reason = (
                f"limits.time_s={most.time_s:g} is exceeded: the run was in {self.doing} after {seconds:.0f} s; "
                "raise the limit, or score fewer windows"
            )


def _died(code: int | None, watch: _Watch) -> str:
    where = f"during {watch.doing}, with {watch.resident / _GIB:.2f} GiB resident"
    if code == -signal.SIGKILL:
        return (
            f"the run was killed (SIGKILL) {where}: as the system does when memory runs out; free memory, or use less"
        )
    if code is not None and code < 0:
        return f"the run's process crashed ({signal.Signals(-code).name}) {where}; isolate=false shows more"
    return f"the run's process ended by itself with exit code {code} {where}; isolate=false shows more"


def _work(events: Connection, life: Connection, place: Place, raw: Json, show_traceback: bool) -> None:
    """The new process: carry out the run and tell of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep is interrupted, and ends this process
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    os.chdir(place.folder)
    os.environ.clear()
    os.environ.update(place.environment)
    with suppress(OSError):  # Linux alone
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)
    record, skipped = execute_run(raw, _Teller(events), show_traceback)
    events.send(("done", record, skipped))


def _end_with(life: Connection) -> None:
    """Wait until the other end is gone, with the process that held it."""
    with suppress(EOFError, OSError):
        life.recv()
    os._exit(1)


class _Teller:
    """A Track that tells another process what it would show."""

    def __init__(self, events: Connection) -> None:
        self.events = events

    def __call__(self, items: Iterable[T], label: Label, total: int | None = None) -> Generator[T, None, None]:
        self.events.send(("begin", text(label), total))
        try:
            for item in items:
                yield item
                self.events.send(("step", text(label)))
        finally:
            self.events.send(("end",))
