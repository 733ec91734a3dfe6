"""Executes a run in a separate process, so that its end, whatever the cause, becomes a failed row with the reason.

The process is forked from a server that has only imported the modules that every run needs. So it starts without
threads, without memory of other runs, and without importing the libraries again. If the process that waits for it is
killed, it ends too.
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
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
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
_INTERVAL_S = 0.05  # between two checks of the limits
_GIB = 2**30
_OOM_SCORE = "900"  # of 1000: if memory runs out, the system kills the run and not the sweep


class Place(NamedTuple):
    """The working folder and environment of a run; those of the server from which it is forked may differ."""

    folder: str
    environment: dict[str, str]


def execute_isolated(raw: Json, limits: LimitsConfig, track: Track = silent) -> tuple[Record, bool]:
    """Like `execute_run`, in a new process, which is ended if it exceeds `limits`.

    Returns: the record, and whether the run had finished before. If the process dies, the record is a failed one that
    says how.
    """
    process, events, lifeline = _start(raw)
    watch = _Watch(process.pid or 0, limits, track)
    try:
        finished = watch.follow(events)
    finally:
        process.kill()  # also after an error in this process, so that nothing of the run remains
        process.join()
        lifeline.close()
        events.close()
    if finished is not None:
        return finished
    return failed_run(raw, watch.reason or _cause_of_death(process.exitcode, watch)), False


def _start(raw: Json) -> tuple[BaseProcess, Connection, Connection]:
    """Start the process of a run.

    Returns: the process; the connection from which its events are read; and a connection that this process keeps open:
    when it closes, the new process ends.
    """
    methods = (None, *multiprocessing.get_all_start_methods())
    if multiprocessing.get_start_method(allow_none=True) not in methods:  # joblib's, which a new process does not know
        multiprocessing.set_start_method("forkserver", force=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    _start_server()
    events, sender = context.Pipe(duplex=False)
    receiver, lifeline = context.Pipe(duplex=False)
    place = Place(os.getcwd(), dict(os.environ))  # noqa: PTH109 - a string is sent to the other process
    process = context.Process(target=_work, args=(sender, receiver, place, raw))
    process.start()
    sender.close()
    receiver.close()
    return process, events, lifeline


def _start_server() -> None:
    """Start the server, if it does not run yet, so that it never receives SIGINT.

    Ctrl-C goes to all processes of a terminal, and would end the server with a traceback while it imports. It inherits
    a blocked SIGINT; a Ctrl-C in this process during the start is delivered when the signal is unblocked.
    """
    resource_tracker.ensure_running()  # it unblocks the signal when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass
class _Watch:
    """Follows the process of a run: its progress, its memory and its time.

    reason    the limit for which the process was ended; empty if it was not ended
    activity  the latest label of its progress
    resident  its resident memory in bytes, when last checked
    started   time of the start, on the monotonic clock
    """

    pid: int
    limits: LimitsConfig
    track: Track
    reason: str = ""
    activity: str = "start"
    resident: int = 0
    started: float = field(default_factory=time.monotonic)

    def follow(self, events: Connection) -> tuple[Record, bool] | None:
        """Show the progress of the process until it ends or exceeds a limit.

        Returns: what `execute_run` returned in the process; None if the process died or exceeded a limit.
        """
        bars: list[Generator[int, None, None]] = []
        try:
            while not self.reason:
                if not events.poll(_INTERVAL_S):
                    self._check_limits()
                    continue
                kind, *arguments = events.recv()
                if kind == "done":
                    return arguments[0], arguments[1]
                self._show(bars, kind, *arguments)
                self._check_limits()
        except (EOFError, ConnectionError):
            pass
        finally:
            for bar in reversed(bars):
                bar.close()
        return None

    def _show(
        self, bars: list[Generator[int, None, None]], kind: str, label: str = "", total: int | None = None
    ) -> None:
        """Show one event: "begin" opens a progress bar, "step" advances the innermost, "end" closes it."""
        self.activity = label or self.activity
        if kind == "begin":
            bars.append(self.track(count(), lambda: self.activity, total))
        if kind == "end":
            bars.pop().close()
        else:
            next(bars[-1])

    def _check_limits(self) -> None:
        with suppress(psutil.Error):  # the process may have ended
            self.resident = psutil.Process(self.pid).memory_info().rss or self.resident  # 0 if it has just died
        seconds, limits = time.monotonic() - self.started, self.limits
        if limits.memory_gib is not None and self.resident > limits.memory_gib * _GIB:
            self.reason = (
                f"limits.memory_gib={limits.memory_gib:g} is exceeded: {self.resident / _GIB:.2f} GiB were resident "
                f"during {self.activity}; raise the limit, or use a smaller model, batch or calibration"
            )
        elif limits.time_s is not None and seconds > limits.time_s:
            self.reason = (
                f"limits.time_s={limits.time_s:g} is exceeded: the run was in {self.activity} after {seconds:.0f} s; "
                "raise the limit, or score fewer windows"
            )


def _cause_of_death(code: int | None, watch: _Watch) -> str:
    """The error of a run whose process ended without a record, with exit code `code`."""
    where = f"during {watch.activity}, with {watch.resident / _GIB:.2f} GiB resident"
    if code == -signal.SIGKILL:
        return (
            f"the run was killed (SIGKILL) {where}: the system does this when memory runs out; free memory, or use less"
        )
    if code is not None and code < 0:
        return f"the run's process crashed ({signal.Signals(-code).name}) {where}; isolate=false shows more"
    return f"the run's process ended by itself with exit code {code} {where}; isolate=false shows more"


def _work(events: Connection, lifeline: Connection, place: Place, raw: Json) -> None:
    """The main function of the new process: execute the run, and send its progress and its record."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C interrupts the sweep, which then ends this process
    threading.Thread(target=_exit_after, args=(lifeline,), daemon=True).start()
    os.chdir(place.folder)
    os.environ.clear()
    os.environ.update(place.environment)
    with suppress(OSError):  # only Linux has it
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    record, skipped = execute_run(raw, _Reporter(events))
    events.send(("done", record, skipped))


def _exit_after(lifeline: Connection) -> None:
    """Wait until the other end of `lifeline` closes, which happens when its process ends; then end this process."""
    with suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


class _Reporter:
    """A Track that sends its events to another process, which shows them."""

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
