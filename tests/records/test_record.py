"""Records are complete or absent, also after kills, full disks, failures, and with two writers."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from harness.records import Record, environment, store
from tests.conftest import ROOT

Json = dict[str, Any]
LAYERS = [
    {
        "name": f"blocks.{i}.x",
        "shape": [2, 4],
        "stored_bits": 24,
        "bits_per_weight": 3.0,
        "weight_error": 0.125 * (i + 1),
    }
    for i in range(2)
]


def test_round_trip(tmp_path: Path) -> None:
    written = Record(run_id="a1", metrics={"perplexity": 2.5}, warnings=["w"], layers=LAYERS)
    path = store.write(written, tmp_path)
    assert store.read(path) == written
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a1.json", "a1.layers.parquet"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_json_has_a_row_for_each_kind_of_linear(tmp_path: Path) -> None:
    path = store.write(Record(run_id="a1", layers=LAYERS), tmp_path)
    (row,) = json.loads(path.read_text())["layers"]
    assert row == {"name": "blocks.*.x", "linears": 2, "bits_per_weight": 3.0, "weight_error": 0.25}


def test_a_record_without_linears_has_no_file_for_them(tmp_path: Path) -> None:
    store.write(Record(run_id="a1", layers=LAYERS), tmp_path)
    path = store.write(Record(run_id="a1"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a1.json"]
    assert store.read(path).layers == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "colour='red' is an unknown key; expected one of: run_id"),
        ({"execution": {"mode": "quick"}}, "execution.mode='quick' is unknown; expected one of: packed"),
        ({"schema": 1}, "schema=1 is not 2, run it again"),
    ],
)
def test_a_record_of_another_shape_is_refused_in_one_line(tmp_path: Path, change: Json, message: str) -> None:
    path = store.write(Record(run_id="a1"), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        store.read(path)
    assert "\n" not in str(raised.value)


def test_nan_never_reaches_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        store.write(Record(run_id="a1", metrics={"nll": float("nan")}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_file_and_keeps_the_earlier_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(Record(run_id="a1", metrics={"nll": 1.0}), tmp_path)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write(Record(run_id="a1", metrics={"nll": 2.0}), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a1.json"]
    assert store.read(tmp_path / "a1.json").metrics == {"nll": 1.0}


def test_a_failure_never_replaces_a_result(tmp_path: Path) -> None:
    store.write(Record(run_id="a1", metrics={"nll": 1.0}), tmp_path)
    store.write(Record(run_id="a1", status="failed", error="x"), tmp_path)
    assert store.read(tmp_path / "a1.json").status == "ok"
    store.write(Record(run_id="b2", status="failed", error="x"), tmp_path)
    assert store.finished(tmp_path, "b2") is None
    store.write(Record(run_id="b2"), tmp_path)
    assert store.finished(tmp_path, "b2") is not None


def test_a_result_that_arrives_while_a_failure_is_written_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync
    writer = threading.Thread(target=lambda: store.write(Record(run_id="a1", metrics={"nll": 1.0}), tmp_path))

    def other_writer_starts(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        writer.start()

    monkeypatch.setattr(os, "fsync", other_writer_starts)
    store.write(Record(run_id="a1", status="failed", error="x"), tmp_path)
    writer.join()
    assert store.read(tmp_path / "a1.json").status == "ok"
    assert [file.name for file in tmp_path.iterdir()] == ["a1.json"]


def test_a_damaged_file_is_treated_as_absent(tmp_path: Path) -> None:
    (tmp_path / "a1.json").write_text('{"run_id": "a1", "sta')
    assert store.finished(tmp_path, "a1") is None
    with pytest.raises(ValueError, match=r"a1.json is not a record .*; expected JSON of a run"):
        store.read(tmp_path / "a1.json")


@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.replace"])
def test_killed_while_writing(moment: str, tmp_path: Path) -> None:
    """SIGKILL immediately before a record is in place: the old one stays complete, and no partial one appears."""
    store.write(Record(run_id="a1", metrics={"nll": 1.0}), tmp_path)
    module, _, attribute = moment.rpartition(".")
    script = f"""
import os, pathlib, signal
from harness.records import Record, write
{module}.{attribute} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write(Record(run_id="a1", metrics={{"nll": 2.0}}), pathlib.Path({str(tmp_path)!r}))
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert [file.name for file in tmp_path.glob("*.json")] == ["a1.json"]
    assert store.read(tmp_path / "a1.json").metrics == {"nll": 1.0}


def test_environment_has_the_properties_in_which_two_machines_may_differ() -> None:
    current = environment()
    assert str(current.packages["torch"]).startswith("2.")
    machine = (current.python, current.cpu, current.cores, current.threads, current.commit, current.platform)
    assert None not in machine
