"""Two folders compared: rows matched by what they are, moves told from noise, and what only one of them has."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.cli import table
from harness.records import Record, Text, read, write
from harness.reports import comparison_sheet
from harness.reports.intervals import difference
from harness.reports.match import other_changes
from tests.reports.test_table import NLL, WOBBLE, make, scored

TIMES = {"decode_ms_p10": 10.0, "decode_ms_p50": 11.0, "decode_ms_p90": 12.0}


def near(shift: float) -> list[float]:
    return [x + shift + d for x, d in zip(NLL, WOBBLE, strict=True)]


def again(run: Record, **changes: Any) -> Record:
    """The same run by another version of the source."""
    return replace(run, run_id=f"{run.run_id}2", **changes)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Old and new: a row that is identical, one within noise, one that moved, one that fails now; one of each alone."""
    runs = {bits: scored(f"run{bits}", near(0.1 * bits), bits=bits) for bits in (2, 3, 4, 5)}
    old = [*runs.values(), scored("gone", NLL, "gone")]
    moved = scored("moved", [x + 0.3 for x in runs[4].window_nll], bits=4)
    new = [
        again(runs[2]),
        scored("noise", [x + d for x, d in zip(runs[3].window_nll, reversed(WOBBLE), strict=True)], bits=3),
        moved,
        again(runs[5], status="failed", error="no disk"),
        scored("added", NLL, "added"),
    ]
    for name, records in (("old", old), ("new", new)):
        for found in records:
            write(found, tmp_path / name)
    return tmp_path / "old", tmp_path / "new"


def test_verdicts_with_what_moved_first(folders: tuple[Path, Path]) -> None:
    found = comparison_sheet("{},{}".format(*folders))
    rows = found.frame.set_index("bits")
    shown = found.shown.set_index("bits")
    assert dict(shown["verdict"]) == {"4": "moved", "5": "ok -> failed", "3": "same", "2": "identical"}
    assert set(shown.index[:2]) == {"4", "5"}
    old, new = (read(folder / f"{name}.json") for folder, name in zip(folders, ("run4", "moved"), strict=True))
    moved = rows[rows["verdict"] == "moved"].iloc[0]
    assert tuple(moved[["ratio", "ratio_low", "ratio_high"]]) == difference(new, old).ratio
    assert (moved["run_id_old"], moved["run_id_new"]) == ("run4", "moved")
    assert shown.loc["4", "perplexity"] == f"{old.metrics['perplexity']:.2f} -> {new.metrics['perplexity']:.2f}"
    assert "4 in both (" in found.head[0]


def test_rows_of_one_folder_are_listed(folders: tuple[Path, Path]) -> None:
    found = comparison_sheet("{},{}".format(*folders))
    assert [note.split(": ")[1] for note in found.notes] == [
        "m added group64 bits=4 float32 packed (added)",
        "m gone group64 bits=4 float32 packed (gone)",
    ]
    assert list(found.frame["verdict"][4:]) == [f"only in {folders[0]}", f"only in {folders[1]}"]
    assert found.frame["perplexity_old"].notna().sum() == 5


@pytest.mark.parametrize("key", ["seed", "bits", "options", "dtype", "execution", "calibration", "activation"])
def test_a_run_that_is_another_does_not_match(key: str, tmp_path: Path) -> None:
    old, new = scored("a", NLL), scored("b", NLL)
    if key == "seed":
        new.config["seed"] = 1
    elif key == "bits":
        new.config["scheme"]["weight"]["bits"] = 3
    elif key == "options":
        new.options = {"rtn.shrink": 0.5}
    elif key == "calibration":
        new.data = replace(new.data, calibration=Text(num_windows=32))
    elif key == "activation":
        new.config["scheme"]["activation"] = {"bits": 8}
    else:
        changes = {"dtype": "bfloat16"} if key == "dtype" else {"mode": "simulated"}
        new.execution = replace(new.execution, **changes)
    write(old, tmp_path / "old")
    write(new, tmp_path / "new")
    found = comparison_sheet(f"{tmp_path / 'old'},{tmp_path / 'new'}")
    assert len(found.shown) == 0
    assert len(found.notes) == 2


def test_rows_that_are_alike_are_not_paired_by_chance(tmp_path: Path) -> None:
    write(scored("a", NLL), tmp_path / "old")
    write(scored("b", NLL), tmp_path / "old")
    write(scored("c", NLL), tmp_path / "new")
    found = comparison_sheet(f"{tmp_path / 'old'},{tmp_path / 'new'}")
    assert len(found.shown) == 0
    assert [note.partition(" in ")[0] for note in found.notes] == ["1 alike", "2 alike", "2 alike"]


def test_times_moved_only_when_their_spans_lie_apart() -> None:
    old = scored("a", NLL)
    old.metrics |= TIMES | {"bits_per_weight": 4.25}
    touching, apart, counted = (again(old, metrics=dict(old.metrics)) for _ in range(3))
    touching.metrics |= {"decode_ms_p10": 12.0, "decode_ms_p50": 14.0, "decode_ms_p90": 20.0}
    apart.metrics |= {"decode_ms_p10": 12.5, "decode_ms_p50": 14.0, "decode_ms_p90": 20.0}
    counted.metrics |= {"bits_per_weight": 4.5, "model_size_mib": 11.0}
    assert other_changes(old, touching) == []
    assert other_changes(old, apart) == ["decode_ms 11 -> 14"]
    assert other_changes(old, counted) == ["bits_per_weight 4.25 -> 4.5", "model_size_mib 10 -> 11"]
    other_work = again(apart, config=apart.config | {"measure": {"batch_size": 8}})
    assert other_changes(old, other_work) == []


def test_divergence_moved_only_beyond_its_interval() -> None:
    old, near_it, far = (scored("a", NLL) for _ in range(3))
    old.window_kl = [0.02] * len(NLL)
    near_it.window_kl = [0.02 + 0.1 * wobble for wobble in WOBBLE]
    far.window_kl = [0.03 + 0.1 * wobble for wobble in WOBBLE]
    assert other_changes(old, near_it) == []
    assert other_changes(old, far) == ["kl 0.02 -> 0.03007"]


def test_two_records_are_a_pair_whatever_they_are(folders: tuple[Path, Path]) -> None:
    found = comparison_sheet(f"{folders[0] / 'gone.json'},{folders[1] / 'added.json'}")
    assert list(found.shown["method"]) == ["gone -> added"]
    assert list(found.shown["verdict"]) == ["identical"]


def test_what_was_not_scored_is_not_called_the_same(tmp_path: Path) -> None:
    for name, run in (("old", make("a", 20.0)), ("new", make("b", 20.0))):
        write(run, tmp_path / name)
    assert list(comparison_sheet(f"{tmp_path / 'old'},{tmp_path / 'new'}").shown["verdict"]) == ["not scored"]


def test_means_over_seeds_are_compared(tmp_path: Path) -> None:
    for name, shift in (("old", 0.0), ("new", 0.2)):
        for seed in range(2):
            write(scored(f"{name}{seed}", near(shift + 0.01 * seed), seed=seed), tmp_path / name)
    found = comparison_sheet(f"{tmp_path / 'old'},{tmp_path / 'new'}", seeds=True)
    assert list(found.shown["verdict"]) == ["moved"]
    assert found.frame["run_id_new"][0] == "new0+new1"


def test_command_line(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = "compare={},{}".format(*folders)
    assert table.main([asked]) == 0
    assert "| moved " in capsys.readouterr().out
    assert table.main([asked, "format=csv"]) == 0
    assert len(pd.read_csv(io.StringIO(capsys.readouterr().out))) == 6
    assert table.main([asked, "format=latex"]) == 0
    assert r"$\to$" in capsys.readouterr().out
    assert table.main([asked, "format=parquet", f"output={tmp_path / 'c.parquet'}"]) == 0
    assert len(pd.read_parquet(tmp_path / "c.parquet")) == 6


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("{old}", "does not name two; expected folders or records, as compare=OLD,NEW"),
        ("{old},/nowhere", "compare: /nowhere is neither a folder nor a record"),
        ("{old},{empty}", "holds no records; name a folder that does"),
        ("{old}/run4.json,{other}/other.json", "tokens_sha256=u of run other and t of run run4 cannot be compared"),
    ],
)
def test_bad_input_is_one_line(
    asked: str, message: str, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    write(scored("other", NLL, tokens="u"), tmp_path / "else")
    asked = asked.format(old=folders[0], empty=tmp_path / "empty", other=tmp_path / "else")
    assert table.main([f"compare={asked}"]) == 1
    written = capsys.readouterr().err
    assert message in written
    assert written.count("\n") == 1
    assert table.main(["compare=a,b", "format=parquet"]) == 1
    assert "add output=FILE.parquet" in capsys.readouterr().err
