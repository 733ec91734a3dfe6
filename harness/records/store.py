"""One JSON file a run: what was asked, what ran, on what, and what came out."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from harness.utils.progress import Track, silent

Json = dict[str, Any]

_PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "hydra-core",
    "gguf",
    "bitsandbytes",
)


_ROOM = 2**20  # bytes that a folder has to have left: several times what a record takes


@dataclass
class Record:
    """A run. A metric that was not measured is absent from `metrics`, never zero.

    status     ok or failed, with the reason in `error`
    config     the resolved configuration, as Hydra gave it
    code       digest of the code that ran it, or of newer code that gave the same bits
    confirmed  the commit of that newer code; empty where none was needed
    options    of the method's steps and the engine, those that are not at their defaults
    execution  mode (packed, simulated or float), the kernel, the device and the float types
    data       sources, hashes, window counts and the protocol of evaluation and calibration
    window_nll mean negative log likelihood of each window of the stream; window_kl its mean KL from the float model
    layers     a row for each linear of the decoder blocks
    kv         MiB of the KV cache by batch and length, where they were computed
    analysis   what the error is attributed to, on request: sensitivity, outliers, and an allocation of widths
    stages     seconds of each stage
    """

    run_id: str
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None
    config: Json = field(default_factory=dict)
    code: str = ""
    confirmed: Json = field(default_factory=dict)
    options: Json = field(default_factory=dict)
    environment: Json = field(default_factory=dict)
    model: Json = field(default_factory=dict)
    execution: Json = field(default_factory=dict)
    data: Json = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    window_nll: list[float] = field(default_factory=list)
    window_kl: list[float] = field(default_factory=list)
    layers: list[Json] = field(default_factory=list)
    kv: list[Json] = field(default_factory=list)
    analysis: Json = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)


def path_of(folder: Path, run: str) -> Path:
    """Where the record of a run belongs."""
    return folder / f"{run}.json"


def usable(folder: Any) -> Path:
    """The folder for records, made and proved writable before a run spends an hour on what cannot be kept.

    Raises: ValueError if it is no name of a folder, or cannot be written.
    """
    if not isinstance(folder, str) or not folder:
        raise ValueError(f"results_dir={folder!r} is no folder; expected a name such as results/runs")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_ROOM))
            probe.flush()
            return Path(folder)
    except OSError as error:
        raise ValueError(
            f"results_dir={folder} cannot be written ({error.strerror}); free space or name another folder"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other writers; the lock is on the folder itself and leaves no file.

    What was renamed inside is on the disk at the end, lest a power loss take it back.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        with suppress(OSError):  # some file systems have no such call, and the record is there
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(record: Record, folder: Path) -> Path:
    """Write a record whole or not at all; a failed run never takes the place of a finished one.

    Raises: OSError if the disk is full or the folder cannot be written; nothing is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = path_of(folder, record.run_id)
    handle, name = tempfile.mkstemp(prefix=f".{record.run_id}.", suffix=".part", dir=folder)
    try:
        with os.fdopen(handle, "w") as stream:
            json.dump(asdict(record), stream, indent=1, allow_nan=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)  # mkstemp gives it to its owner alone
        with _locked(folder):
            if record.status == "failed" and finished(folder, record.run_id):
                Path(name).unlink()
            else:
                Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


def rescue(record: Record) -> Path | None:
    """Write a record that its folder did not take among the system's temporary files; None if they are full too."""
    try:
        return write(record, Path(tempfile.mkdtemp(prefix="ptqbench-")))
    except (OSError, ValueError):
        return None


def read(path: Path) -> Record:
    """The record in a file.

    Raises: ValueError if the file is no record.
    """
    try:
        loaded = json.loads(path.read_text())
        known = {item.name for item in fields(Record)}
        return Record(**{key: value for key, value in loaded.items() if key in known})
    except (OSError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no record ({' '.join(str(error).split())}); expected JSON of a run") from error


def finished(folder: Path, run: str) -> Record | None:
    """The record of a run that ended well before, if there is one."""
    path = path_of(folder, run)
    if not path.exists():
        return None
    try:
        found = read(path)
    except ValueError:
        return None
    return found if found.status == "ok" else None


def environment() -> Json:
    """Versions, processor, memory and commit; what two machines may differ in."""
    found: Json = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this source tree, with -dirty where tracked files differ; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


@contextmanager
def stage(found: Record, name: str, track: Track = silent) -> Iterator[None]:
    """Time a stage. `track` is for those with no steps of their own to count: it shows that they go on."""
    shown = track([name], name, 1)
    start = time.perf_counter()
    try:
        next(shown)
        yield
    finally:
        found.stages[name] = found.stages.get(name, 0.0) + time.perf_counter() - start
        shown.close()
