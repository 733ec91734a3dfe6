"""A saved quantized model takes the bytes of bits_per_weight; nothing is overwritten, and no result is lost."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from harness import models
from harness.models.exchange import folder_writer
from harness.records import Record, store, sweep
from harness.runs import execute_run
from tests.conftest import resolve

LONG = ("data.seq_len=64", "data.max_windows=1", "data.num_samples=2", "data.calibration_seq_len=32", "measure=off")


def saved(tmp_path: Path, *overrides: str) -> tuple[Record, Path]:
    """Run and save a model; returns the record and the folder of the model."""
    folder = tmp_path / "saved"
    raw = resolve(
        "model=tiny", *LONG, f"results_dir={tmp_path}", f"save={folder}", "scheme.weight.group_size=16", *overrides
    )
    return execute_run(raw)[0], folder


@pytest.mark.parametrize("scheme", ["group64", "group64_sym"])
def test_the_file_takes_the_bytes_of_bits_per_weight(tmp_path: Path, scheme: str) -> None:
    record, folder = saved(tmp_path, f"scheme={scheme}", "bits=4")
    parts = {"qweight", "scale", "zero_point"}
    with safe_open(folder / "model.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    stored = sum(size for name, size in sizes.items() if name.rpartition(".")[2] in parts)
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in record.layers)
    assert 8 * stored == record.metrics["bits_per_weight"] * weights
    assert sum(sizes.values()) == record.metrics["model_size_mib"] * 2**20


def test_a_finished_run_runs_again_to_save_and_nothing_is_overwritten(tmp_path: Path) -> None:
    first, folder = saved(tmp_path, "scheme=group64")
    before = (folder / "model.safetensors").read_bytes()
    second, _ = saved(tmp_path, "scheme=group64")
    assert second.status == "failed"
    assert "already contains a model; choose another folder" in str(second.error)
    assert (folder / "model.safetensors").read_bytes() == before
    again, skipped = execute_run(first.config | {"save": str(tmp_path / "other")})
    assert not skipped
    assert again.run_id == first.run_id
    assert (tmp_path / "other/model.safetensors").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_an_error_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.Source, "load", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "file").touch()
    raw = resolve("model=tiny", *LONG, f"results_dir={tmp_path}", f"save={tmp_path}/file/new")
    record, _ = execute_run(raw)
    assert record.status == "failed"
    assert str(record.error).startswith(f"save={tmp_path}/file/new cannot be written, because of ")
    assert str(record.error).endswith("/file; choose another folder")
    assert len(str(record.error)) <= 200


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_a_model_that_cannot_be_saved_loses_no_result(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> None:
    complete, _ = saved(tmp_path, "scheme=group64")
    earlier = store.path_of(tmp_path / "runs", complete.run_id)
    store.write(replace(complete, code="that of earlier code"), earlier.parent)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(folder_writer, "save_file", full)
    folder = tmp_path / "full"
    line = ("model=tiny", *LONG, "scheme=group64", "scheme.weight.group_size=16", f"save={folder}")
    done = command(*line, f"results_dir={tmp_path}/runs")
    assert done.returncode == 1
    record = store.read(earlier)
    assert record.status == "ok"
    assert record.unsaved == f"save={folder} cannot be written ({error}); free disk space or choose another folder"
    assert record.metrics["nll"] == complete.metrics["nll"]
    (shown,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert shown.endswith(f": the model was not saved: {record.unsaved}")
    assert not (folder / "model.safetensors").exists()
    assert [sweep.entry_of(0, record, skipped, 1.0).status for skipped in (False, True)] == ["failed", "ok"]
    assert command(*line[:-1], f"results_dir={tmp_path}/runs").returncode == 0
    assert store.read(earlier).unsaved is None
