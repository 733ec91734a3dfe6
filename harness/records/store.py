"""Records on disk: one JSON file for each run, and a Parquet file next to it with the rows of its linears."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.config import build
from harness.records.layers import read_layers, summary, write_layers
from harness.records.record import SCHEMA, Record
from harness.utils.errors import Refusal
from harness.utils.files import replacing

_ROOM = 2**20  # bytes that must be free in a folder: several times the size of a record


def path_of(folder: Path, run: str) -> Path:
    """The file of a run's record."""
    return folder / f"{run}.json"


def layers_of(path: Path) -> Path:
    """The file with the rows of a record's linears."""
    return path.with_suffix(".layers.parquet")


def usable(folder: Any) -> Path:
    """The folder for records, created if necessary, and tested to be writable.

    A run calls this first, so that it does not spend an hour on a result that cannot be stored.
    Raises: Refusal if `folder` is not a name, or records cannot be written into it.
    """
    if not isinstance(folder, str) or not folder:
        raise Refusal(f"results_dir={folder!r} is not a folder; expected a name such as results/runs")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_ROOM))
            probe.flush()
            return Path(folder)
    except OSError as error:
        raise Refusal(
            f"results_dir={folder} cannot be written ({error.strerror}); free space or name another folder"
        ) from error


def write(record: Record, folder: Path) -> Path:
    """Write a record completely or not at all; the record of a failed run never replaces that of a finished run.

    Raises: OSError if the disk is full or the folder cannot be written, ValueError for a number that JSON does not have
    (NaN, infinity). After an error, the folder is unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = path_of(folder, record.run_id)
    text = _text(record)
    with _locked(folder):
        if record.status == "failed" and finished(folder, record.run_id):
            return target
        with replacing(target) as part:
            part.write_text(text)
            if record.layers:
                with replacing(layers_of(target)) as rows:
                    write_layers(record.layers, rows)
            else:
                layers_of(target).unlink(missing_ok=True)
    return target


def rescue(record: Record) -> Path | None:
    """Write a record into a temporary folder, if its folder cannot be written; None if this fails too."""
    try:
        return write(record, Path(tempfile.mkdtemp(prefix="ptqbench-")))
    except (OSError, ValueError):
        return None


def read(path: Path) -> Record:
    """Read a record from a file, with the rows of its linears.

    Raises: ValueError, in one line, if the file is not a record of this schema, or has an unknown key.
    """
    try:
        values = json.loads(path.read_text())
        schema = values.get("schema") if isinstance(values, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"schema={schema} is not {SCHEMA}, run it again")
        rows = layers_of(path)
        record = build(Record, values | {"layers": read_layers(rows) if rows.exists() else []}, "")
    except (OSError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a record ({' '.join(str(error).split())}); expected JSON of a run") from error
    return record


def finished(folder: Path, run: str) -> Record | None:
    """The record of a run that has finished without an error; None if there is none, or its file cannot be read."""
    path = path_of(folder, run)
    if not path.exists():
        return None
    try:
        record = read(path)
    except ValueError:
        return None
    return record if record.status == "ok" else None


def _text(record: Record) -> str:
    """A record as JSON: its sections without values that are None, and `layers` as one row for each kind of linear."""
    values = asdict(record) | {"layers": summary(record.layers)}
    for name in ("refused", "unsaved"):  # rare
        if not values[name]:
            del values[name]
    values |= {name: _without_none(values[name]) for name in ("environment", "model", "execution", "data")}
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def _without_none(section: dict[str, Any]) -> dict[str, Any]:
    """A section without values that are None; `packages` keeps its None, for packages that are not installed."""
    return {
        name: _without_none(value) if isinstance(value, dict) and name != "packages" else value
        for name, value in section.items()
        if value is not None
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Exclude other writers from a folder. The lock is on the folder itself, so that no lock file remains.

    At the end, renames in the folder are flushed to the disk, so that a power loss does not undo them.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        with suppress(OSError):  # not all file systems support this; the record is complete without it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
