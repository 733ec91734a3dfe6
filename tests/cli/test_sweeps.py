"""Sweeps: what is refused before the first run, which run it is, and how long the others take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.cli import sweeps
from harness.records import Record, sweep
from tests.conftest import TINY

Command = Callable[..., Any]


def test_values_that_exclude_each_other_in_some_runs_are_refused_rows(tmp_path: Path, command: Command) -> None:
    results = tmp_path / "runs"
    line = ["-m", *TINY, "measure=off", "isolate=false", f"save={tmp_path}/saved", f"results_dir={results}"]
    done = command(*line, "method=rtn,rotate", "scheme=channel")
    assert done.returncode == 1
    assert "method.rotate" in done.stderr
    by_method = {next(iter(record["config"]["method"])): record for record in _records(results)}
    assert by_method["rtn"]["status"] == "ok"
    assert (by_method["rotate"]["status"], by_method["rotate"]["refused"]) == ("failed", True)
    assert done.stdout.count("| refused") == 1
    assert "refused " + by_method["rotate"]["run_id"] in done.stdout
    for show, count in (("hide", 1), ("list", 1), ("show", 2)):
        table = command("table", f"runs={results}", f"failed={show}").stdout
        assert table.count("\n| r") == count
        assert ("refused" in table) == (show != "hide")
    only = command(*line, "method=rotate", "scheme=channel,group32", "force=true")
    assert only.returncode == 1
    assert only.stderr.endswith("nothing was run\n")
    assert len(_records(results)) == 2


def test_which_run_it_is_stands_on_its_lines(tmp_path: Path, command: Command) -> None:
    done = command("-m", *TINY, "measure=off", "isolate=false", f"results_dir={tmp_path}", "method=none,rtn")
    lines = done.stderr.splitlines()
    assert lines[0] == "run 1 of 2 ..."
    assert lines[2].startswith("run 2 of 2, about ")
    assert [line.endswith(f"(run {i} of 2)") for i, line in ((1, lines[1]), (2, lines[3]))] == [True, True]


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in folder.glob("*.json")]


def test_the_time_left_is_the_median_of_finished_runs_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTQBENCH_SWEEP_RUNS", "10")
    monkeypatch.setenv("PTQBENCH_SWEEP_ORDERED", "1")
    assert sweeps.place(1) == "run 2 of 10"
    assert sweeps.time_left(tmp_path, 0) == ""
    for number, seconds in enumerate((100.0, 120.0, 140.0)):
        sweep.note(tmp_path, sweep.entry_of(number, Record(str(number)), False, seconds))
    sweep.note(tmp_path, sweep.entry_of(3, Record("3"), True, 0.1))  # a skipped run says nothing of the others
    assert sweeps.time_left(tmp_path, 4) == "about 12 min left (from 3 finished)"
    sweep.note(tmp_path, sweep.entry_of(4, Record("4"), False, 3000.0))
    assert sweeps.time_left(tmp_path, 5) == "about 11 min left (runs took 2 min to 50 min)"
    monkeypatch.setenv("PTQBENCH_SWEEP_ORDERED", "")
    assert sweeps.time_left(tmp_path, 5) == ""


def test_durations_have_the_unit_that_a_reader_expects() -> None:
    assert [sweeps.duration(seconds) for seconds in (5.4, 99.0, 400.0, 7200.0)] == ["5 s", "99 s", "7 min", "2.0 h"]
