"""Records are whole or absent: through kills, full disks, failures and two writers."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.records import Record, store
from tests.conftest import ROOT


def test_round_trip(tmp_path: Path) -> None:
    written = Record(run_id="a1", metrics={"perplexity": 2.5}, warnings=["w"], layers=[{"name": "x"}])
    path = store.write(written, tmp_path)
    assert store.read(path) == written
    assert [file.name for file in tmp_path.iterdir()] == ["a1.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_nan_never_reaches_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        store.write(Record(run_id="a1", metrics={"nll": float("nan")}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(Record(run_id="a1", metrics={"nll": 1.0}), tmp_path)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write(Record(run_id="a1", metrics={"nll": 2.0}), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a1.json"]
    assert store.read(tmp_path / "a1.json").metrics == {"nll": 1.0}


def test_a_failure_never_takes_the_place_of_a_result(tmp_path: Path) -> None:
    store.write(Record(run_id="a1", metrics={"nll": 1.0}), tmp_path)
    store.write(Record(run_id="a1", status="failed", error="x"), tmp_path)
    assert store.read(tmp_path / "a1.json").status == "ok"
    store.write(Record(run_id="b2", status="failed", error="x"), tmp_path)
    assert store.finished(tmp_path, "b2") is None
    store.write(Record(run_id="b2"), tmp_path)
    assert store.finished(tmp_path, "b2") is not None


def test_a_failure_that_comes_between_does_not_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result of another process arrives while a failed one is being written."""
    fsync = os.fsync

    def other_writer_first(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        store.write(Record(run_id="a1", metrics={"nll": 1.0}), tmp_path)

    monkeypatch.setattr(os, "fsync", other_writer_first)
    store.write(Record(run_id="a1", status="failed", error="x"), tmp_path)
    assert store.read(tmp_path / "a1.json").status == "ok"
    assert [file.name for file in tmp_path.iterdir()] == ["a1.json"]


def test_a_damaged_file_counts_as_absent(tmp_path: Path) -> None:
    (tmp_path / "a1.json").write_text('{"run_id": "a1", "sta')
    assert store.finished(tmp_path, "a1") is None
    with pytest.raises(ValueError, match=r"a1.json is no record .*; expected JSON of a run"):
        store.read(tmp_path / "a1.json")


@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.replace"])
def test_killed_while_writing(moment: str, tmp_path: Path) -> None:
    """SIGKILL at the last moments before a record is in place: the old one stays whole, no half one appears."""
    store.write(Record(run_id="a1", metrics={"nll": 1.0}), tmp_path)
    module, _, attribute = moment.rpartition(".")
    script = f"""
import os, pathlib, signal
from harness.record import Record, write
{module}.{attribute} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write(Record(run_id="a1", metrics={{"nll": 2.0}}), pathlib.Path({str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [file.name for file in tmp_path.glob("*.json")] == ["a1.json"]
    assert store.read(tmp_path / "a1.json").metrics == {"nll": 1.0}


def test_run_id_is_a_hash_of_values_whatever_their_order() -> None:
    assert store.run_id({"a": 1, "b": 2}) == store.run_id({"b": 2, "a": 1})
    assert store.run_id({"a": 1}) != store.run_id({"a": 2})


def test_environment_says_what_two_machines_may_differ_in() -> None:
    found = store.environment()
    assert found["packages"]["torch"].startswith("2.")
    assert {"python", "cpu", "cores", "threads", "commit", "platform"} <= set(found)
    json.dumps(found)
