"""Waiting for a state that another process or thread reaches."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import psutil

LIMIT_S = 300  # far more than a busy machine needs
_POLL_S = 0.02


def until(condition: Callable[[], object]) -> None:
    """Return as soon as `condition()` is true; fail the test if that takes longer than `LIMIT_S`."""
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit, f"the expected state was not reached within {LIMIT_S} s"
        time.sleep(_POLL_S)


def descendants(process: subprocess.Popen[bytes]) -> set[psutil.Process]:
    """The processes that a process has started, and those that they have started; none once it has ended."""
    try:
        return set(psutil.Process(process.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def ended(process: psutil.Process) -> bool:
    """Whether a process has ended, even if nobody has read its exit code yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
