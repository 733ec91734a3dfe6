"""Ctrl-C at several moments of a run and of a sweep: one line, exit code 130, and nothing that remains.

Each test waits for a state of the processes, and never for a time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, TINY
from tests.support.waiting import descendants, ended, until

INTERRUPTED = "error: interrupted; finished runs are kept and will be skipped next time"


def server(process: subprocess.Popen[bytes]) -> bool:
    """Whether the server that the processes of runs are forked from has started; it still imports its libraries."""
    return _from_server(process) >= 1


def run(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process of a run has started: it is forked from the server, and has its command line."""
    return _from_server(process) >= 2


def imports(process: subprocess.Popen[bytes]) -> bool:
    """Whether the command imports torch."""
    try:
        return any("torch" in file.path for file in psutil.Process(process.pid).memory_maps())
    except psutil.Error:
        return False


def _from_server(process: subprocess.Popen[bytes]) -> int:
    """The number of processes that have the command line of the server."""
    return sum("forkserver" in " ".join(_command(child)) for child in descendants(process))


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended
        return []


def _heed_interrupts() -> None:
    """A shell lets its background processes ignore SIGINT; if the tests run in one, their children inherit this."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a command in a process group of its own, as a terminal does; all that remains of it ends with the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def started(*arguments: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "harness", *arguments]
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
        processes.append(process)
        return process

    yield started
    for process in processes:
        for child in descendants(process):
            child.kill()
        process.kill()


def interrupted(process: subprocess.Popen[bytes]) -> list[str]:
    """The lines on stderr of a sweep that Ctrl-C ends, and of its processes, without those that begin a run."""
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    return [line for line in errors.decode().splitlines() if not line.startswith("run ")]


@pytest.mark.parametrize("moment", [imports, server, run])
def test_ctrl_c_is_one_line_and_leaves_nothing(
    moment: Callable[[subprocess.Popen[bytes]], bool], start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    sizes = ("data.num_samples=64", "data.calibration_seq_len=2048")  # a run that lasts
    process = start("-m", *TINY, *sizes, "results_dir=new/runs", "method=gptq", "bits=3,4", "measure=off")
    until(lambda: process.poll() is not None or moment(process))
    children = descendants(process)
    assert interrupted(process) == [INTERRUPTED]
    assert process.returncode == 130
    until(lambda: all(ended(child) for child in children))
    assert list(tmp_path.iterdir()) == []


# A method whose run shows a progress bar of a library, as the first run of an embedded model does, and then waits.
WAITING = """
import signal
from dataclasses import dataclass
from pathlib import Path
from tqdm.auto import tqdm
from harness.core import Method

@dataclass(frozen=True, kw_only=True)
class Waiting(Method):
    def quantize(self, weight, scheme, stats):
        list(tqdm([weight]))
        Path("waits").touch()
        signal.pause()
"""


def test_an_interrupted_run_leaves_no_semaphore(start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    (tmp_path / "conf/method").mkdir(parents=True)
    (tmp_path / "conf/method/waiting.yaml").write_text("waiting: {_target_: waiting.Waiting}\n")
    process = start("--config-dir", "conf", "-m", *TINY, "results_dir=runs", "method=waiting", "measure=off")
    until(lambda: process.poll() is not None or (tmp_path / "waits").exists())
    assert interrupted(process) == [INTERRUPTED]
