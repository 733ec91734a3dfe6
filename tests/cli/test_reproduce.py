"""Reruns of records: which figures pass, fail or are skipped, and what the report says about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import models
from harness.cli import reproduce
from harness.config import LimitsConfig, build_run
from harness.records import Execution, Record, runs_of, store
from harness.reports import reproduction
from harness.runs import execute_isolated
from harness.runs.identity import run_id
from harness.utils.hub import UNREACHABLE
from tests.conftest import ROOT, resolve

Tiny = Callable[..., dict[str, Any]]
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def committed(tiny: Tiny, tmp_path: Path) -> Callable[..., Record]:
    """Runs the tiny model with `overrides`; its folder takes the role of results/reference."""

    def make(*overrides: str) -> Record:
        record, _ = execute_isolated(tiny(f"results_dir={tmp_path}/reference", *overrides), LimitsConfig())
        assert record.status == "ok", record.error
        return record

    return make


def run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The exit code, output and errors of the command."""
    capsys.readouterr()
    code = reproduce.main([f"runs={tmp_path}/reference", f"into={tmp_path}/reproduced", *arguments])
    return code, *capsys.readouterr()


def edit(tmp_path: Path, record: Record, change: Edit) -> None:
    """Apply `change` to the JSON file of a record."""
    path = store.path_of(tmp_path / "reference", record.run_id)
    loaded = json.loads(path.read_text())
    change(loaded)
    path.write_text(json.dumps(loaded))


def test_a_folder_reproduces_to_the_bit(
    committed: Callable[..., Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    committed("scheme=w8a8_static")
    committed("method=none", "measure=quick", "measure.prompt_len=8", "measure.repeats=2")
    code, out, err = run_again(tmp_path, capsys)
    assert code == 0, out
    assert out.count("identical in every window") == 4  # perplexity and nll of both
    assert "- environment: nothing else differs" in out
    assert "code and configuration: those of the record in 2 of 2 runs" in out
    assert "| perplexity |" in out
    assert "| exact | identical" in out
    assert "| - | tiny none float32 | decode_ms_p50 |" in out
    assert "[2/2] tiny rtn w8a8_static bits=8" in err
    assert len(list((tmp_path / "reproduced").glob("*.json"))) == 2


def test_a_record_of_other_code_is_confirmed_only_by_the_same_bits(
    committed: Callable[..., Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, moved = committed("bits=3"), committed("bits=4")
    for record in (same, moved):
        edit(tmp_path, record, lambda loaded: loaded.update(code="earlier"))
    edit(tmp_path, moved, lambda loaded: loaded["metrics"].update(nll=loaded["metrics"]["nll"] + 1e-9))
    _, out, _ = run_again(tmp_path, capsys)
    assert "1 records gave the same bits with other code" in out
    confirmed, unconfirmed = (store.read(store.path_of(tmp_path / "reference", run.run_id)) for run in (same, moved))
    assert confirmed.code == same.code
    assert confirmed.metrics == same.metrics
    assert unconfirmed.code == "earlier"


def test_selected_records_and_a_report_in_a_file(
    committed: Callable[..., Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = committed("bits=3"), committed("bits=4")
    output = tmp_path / "out" / "report.md"
    code, out, _ = run_again(tmp_path, capsys, "only=rtn*bits=3", f"output={output}")
    assert code == 0
    assert output.read_text() == out
    assert "bits=4" not in out
    assert store.finished(tmp_path / "reproduced", one.run_id)
    assert not store.finished(tmp_path / "reproduced", other.run_id)
    code, _, err = run_again(tmp_path, capsys, "only=gptq")
    assert code == 1
    assert err.startswith("error: only=gptq matches no finished record; expected a part of one of: tiny rtn")


@pytest.mark.parametrize(
    ("metric", "factor", "shown"),
    [("perplexity", 1.5, "| -33"), ("bits_per_weight", 1.5, "| -33"), ("peak_memory_mib", 3.0, "| -6")],
)
def test_an_altered_figure_fails_and_is_named(
    committed: Callable[..., Record],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    metric: str,
    factor: float,
    shown: str,
) -> None:
    record = committed()
    edit(tmp_path, record, lambda loaded: loaded["metrics"].update({metric: loaded["metrics"][metric] * factor}))
    code, out, _ = run_again(tmp_path, capsys)
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("| FAIL")]
    assert f"| tiny rtn group64 bits=4 float32 | {metric} |" in line
    assert shown in line


def test_the_smallest_difference_fails_on_the_same_machine_and_passes_on_another(
    committed: Callable[..., Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = committed()

    def nudge(loaded: dict[str, Any]) -> None:
        loaded["metrics"]["perplexity"] *= 1 + 1e-9
        loaded["window_nll"][0] += 1e-9

    edit(tmp_path, record, nudge)
    code, out, _ = run_again(tmp_path, capsys)
    assert code == 1
    assert "| FAIL | tiny rtn group64 bits=4 float32 | perplexity |" in out
    assert "| exact | expected to be identical |" in out
    edit(tmp_path, record, lambda loaded: loaded["environment"].update(threads=64, cpu="abacus"))
    code, out, _ = run_again(tmp_path, capsys)
    assert code == 0, out
    assert "- threads: recorded 64, here " in out
    assert "- cpu: recorded abacus, here " in out
    assert "±0.2 %" in out


def test_differences_in_packages_texts_and_code_are_named(
    committed: Callable[..., Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = committed("scheme=w8a8_static")

    def change(loaded: dict[str, Any]) -> None:
        loaded["run_id"] = "0" * 16
        loaded["environment"]["packages"]["numpy"] = "0.1"
        loaded["data"]["calibration"]["tokens_sha256"] = "abc"
        loaded["execution"]["kernel"] = "abacus"

    edit(tmp_path, record, change)
    code, out, _ = run_again(tmp_path, capsys)
    assert code == 0, out
    for line in ("numpy: recorded 0.1, here", "calibration tokens: recorded abc", "kernel: recorded abacus, here"):
        assert f"- {line}" in out
    assert "those of the record in 0 of 1 runs" in out


def test_a_run_that_needs_a_missing_file_or_device_is_skipped_with_the_reason(
    committed: Callable[..., Record],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("something to read " * 100)
    committed("data=text_file", f"data.path={text}")
    text.unlink()
    code, out, _ = run_again(tmp_path, capsys)
    assert code == 0
    assert f"| SKIP | tiny rtn group64 bits=4 float32 | run | - | - |  |  | data.path={text} does not exist" in out
    assert "nothing was compared: 1 SKIP" in out

    gpu = Record("g", config={"model": {}, "data": {}}, execution=Execution(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "the record is from cuda, and torch" in str(reproduce.absent(gpu))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert reproduce.absent(gpu) is None


def test_an_unreachable_hub_is_a_skip_and_any_other_error_a_failure(
    committed: Callable[..., Record],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = committed()
    for error, code, word in ((f"x could not be loaded ({UNREACHABLE})", 0, "SKIP"), ("no disk", 1, "FAIL")):
        failed = Record(record.run_id, status="failed", error=error, config=record.config)
        monkeypatch.setattr(reproduce, "execute_isolated", lambda *_, failed=failed: (failed, False))
        exit_code, out, _ = run_again(tmp_path, capsys)
        assert exit_code == code
        assert f"| {word} | tiny rtn group64 bits=4 float32 | run |" in out
        assert error in out


def test_a_figure_that_is_missing_in_the_rerun_fails(committed: Callable[..., Record]) -> None:
    expected = committed()
    rerun = Record(expected.run_id, metrics={k: v for k, v in expected.metrics.items() if k != "resident_mib"})
    failed = [figure.name for figure in reproduction.compare(expected, rerun) if figure.verdict == "FAIL"]
    assert failed == ["resident_mib"]


def test_configurations_of_older_records_are_completed() -> None:
    whole = resolve("model=tiny", "measure=off", "scheme=w8a8_static")
    older = {key: value for key, value in whole.items() if key not in ("engine", "save", "skip", "execution")}
    older["data"] = {key: value for key, value in whole["data"].items() if key != "calibration_source"}
    older["force"] = True
    completed = reproduce.rerun_config(Record("r", config=older, execution=Execution(device="cpu")), "elsewhere")
    changed = {"results_dir": "elsewhere", "device": "cpu"}
    assert completed == {key: value for key, value in whole.items() if key != "experiment"} | changed


def test_every_committed_record_can_be_run_again() -> None:
    """Today's code reads its configuration: no key was renamed without an adaptation."""
    # Not those in folders below it: git ignores the folders of sweeps, in which reference runs leave refused records.
    paths = sorted(runs_of(ROOT / "results/reference").glob("*.json"))
    assert len(paths) > 60
    for path in paths:
        record = store.read(path)
        config = reproduce.rerun_config(record, "elsewhere")
        config["device"] = "cpu"
        cfg = build_run(config)
        assert cfg.results_dir == "elsewhere"
        if cfg.data.path is None and cfg.model.path is None:
            assert len(run_id(cfg, models.open(cfg.model, cfg.seed))) == 16


def test_command_line_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["run=x"]) == 1
    expected = "error: run=x is unknown; did you mean runs? expected one of: runs, into, published, only, output\n"
    assert capsys.readouterr().err == expected
    assert reproduce.main(["runs=/nowhere"]) == 1
    assert capsys.readouterr().err.startswith("error: runs=/nowhere is no folder")
