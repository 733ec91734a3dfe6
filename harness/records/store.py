"""Records on disk: one JSON file for each run, with the rows of its linears in a Parquet file beside it."""

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

from harness.config.build import build
from harness.records.layers import read_layers, summary, write_layers
from harness.records.record import SCHEMA, Record
from harness.utils.files import replacing

_ROOM = 2**20  # bytes that must be free in a folder: several times the size of a record


def path_of(folder: Path, run: str) -> Path:
    """The file of a run's record."""
    return folder / f"{run}.json"


def layers_of(path: Path) -> Path:
    """The file with the rows of a record's linears."""
    return path.with_suffix(".layers.parquet")


def usable(folder: Any) -> Path:
    """The folder for records, created and proved writable before a run spends an hour on what cannot be kept.

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


def write(record: Record, folder: Path) -> Path:
    """Write a record whole or not at all; a failed run never replaces a finished one.

    Raises: OSError if the disk is full or the folder cannot be written, ValueError for a figure that JSON cannot hold;
    nothing is left behind.
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
    """Write a record that its folder did not take into the system's temporary folder; None if that is full too."""
    try:
        return write(record, Path(tempfile.mkdtemp(prefix="ptqbench-")))
    except (OSError, ValueError):
        return None


def read(path: Path) -> Record:
    """The record in a file, with the rows of its linears.

    Raises: ValueError, in one line, if the file is no record of this schema, or has a key that no record has.
    """
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            found = values.get("schema") if isinstance(values, dict) else None
            raise ValueError(f"schema={found} is not {SCHEMA}, run it again")
        rows = layers_of(path)
        record = build(Record, values | {"layers": read_layers(rows) if rows.exists() else []}, "")
    except (OSError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no record ({' '.join(str(error).split())}); expected JSON of a run") from error
    return record


def finished(folder: Path, run: str) -> Record | None:
    """The record of a run that ended well before, if there is one."""
    path = path_of(folder, run)
    if not path.exists():
        return None
    try:
        record = read(path)
    except ValueError:
        return None
    return record if record.status == "ok" else None


def _text(record: Record) -> str:
    """A record as JSON: sections without what is None, and `layers` as one row for each kind of linear."""
    values = asdict(record) | {"layers": summary(record.layers)}
    return json.dumps(_without_none(values), indent=1, allow_nan=False) + "\n"


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    sections = ("environment", "model", "execution", "data")
    return values | {name: _present(values[name]) for name in sections}


def _present(section: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _present(value) if isinstance(value, dict) and name != "packages" else value
        for name, value in section.items()
        if value is not None
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other writers; the lock is on the folder itself and leaves no file.

    A rename inside is on the disk at the end, so that a power loss does not undo it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        with suppress(OSError):  # some file systems have no such call, and the record is there
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
