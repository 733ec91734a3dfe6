"""The table: ratios to the right baseline, every format, and a README that quotes the records."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from harness import record, table
from harness.record import Record
from tests.conftest import ROOT


def make(
    run_id: str, perplexity: float | None, method: str = "rtn", dtype: str = "float32", tokens: str = "t", bits: int = 4
) -> Record:
    scheme = {"name": "group64", "weight": {"bits": bits}}
    steps = {} if method == "none" else {method: {"_target_": "x.Y"}}
    config = {"model": {"name": "m"}, "method": steps, "scheme": scheme, "data": {"source": "d"}, "seed": 0}
    return Record(
        run_id=run_id,
        status="failed" if perplexity is None else "ok",
        error="no disk" if perplexity is None else None,
        config=config,
        model={"fingerprint": "f"},
        execution={"mode": "packed", "dtype": dtype, "baseline_dtype": "float32", "device": "cpu"},
        data={
            "protocol": "gptq-8",
            "evaluation": {"source": "d", "num_windows": 2, "seq_len": 8, "tokens_sha256": tokens},
        },
        metrics={} if perplexity is None else {"perplexity": perplexity, "model_size_mib": 10.0, "decode_speedup": 0.5},
    )


RECORDS = [
    make("c", 30.0, bits=3),
    make("b", 25.0),
    make("a", 20.0, "none"),
    make("h", 21.0, "none", "bfloat16"),
    make("o", 99.0, tokens="other text"),
    make("x", None, bits=2),
]


def test_ratios_are_to_the_float_run_of_the_same_text() -> None:
    frame = table.to_frame(RECORDS).set_index("run_id")
    assert frame.loc["b", "perplexity_ratio"] == 1.25
    assert frame.loc["a", "perplexity_ratio"] == 1.0
    assert frame.loc["h", "perplexity_ratio"] == 1.05
    assert pd.isna(frame.loc["o", "perplexity_ratio"])
    assert pd.isna(frame.loc["x", "perplexity"])
    assert frame.loc["c", "model_size_mib_ratio"] == 1.0
    assert list(frame.index) == ["a", "h", "b", "o", "c", "x"]


def test_a_failed_run_may_hold_anything() -> None:
    odd = Record(
        run_id="z", status="failed", error="e", config={"method": {"rtn": None}, "scheme": {"weight": {"bits": []}}}
    )
    frame = table.to_frame(
        [
            RECORDS[2],
            odd,
            Record(
                run_id="y", status="failed", error="e", config={"model": None, "scheme": {"weight": 3}, "method": "rtn"}
            ),
        ]
    )
    assert set(frame["run_id"]) == {"a", "y", "z"}
    assert "failed z: e" in table.to_markdown(frame)


def test_markdown_shows_figures_failures_and_what_all_rows_share() -> None:
    text = table.to_markdown(table.to_frame(RECORDS[:3] + RECORDS[5:]))
    assert "model m, data d, protocol gptq-8, windows 2, dtype float32" in text
    assert "25.00 (1.25x)" in text
    assert "failed x: no disk" in text
    assert "| none " in text


def test_a_terminal_of_80_columns_shows_every_figure_whole() -> None:
    out = io.StringIO()
    Console(width=80, file=out).print(table._drawn(table.display(table.to_frame(RECORDS))))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "…" not in out.getvalue()
    assert "25.00" in out.getvalue()
    assert "1.25x" in out.getvalue()


def test_options_tell_rows_apart() -> None:
    one, two = make("p", 1.0), make("q", 2.0)
    one.options = {"rtn.shrink": 0.7}
    two.config["scheme"]["weight"] |= {"grid": "narrow", "group_size": 32, "scale_dtype": "float16"}
    frame = table.to_frame([one, two]).set_index("run_id")
    assert frame.loc["p", "options"] == "shrink=0.7"
    assert frame.loc["q", "options"] == "grid=narrow group_size=32"
    assert "| shrink=0.7 " in table.to_markdown(frame.reset_index())


def test_load_names_what_is_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record.write(RECORDS[0], tmp_path)
    (tmp_path / "other.json").write_text("[]")
    assert [found.run_id for found in table.load(tmp_path)] == ["c"]
    assert "other.json is no record" in capsys.readouterr().err
    with pytest.raises(ValueError, match="runs=.*gone is no folder"):
        table.load(tmp_path / "gone")


def test_command_line_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for found in RECORDS:
        record.write(found, tmp_path)
    assert table.main([f"runs={tmp_path}", "format=csv"]) == 0
    from_csv = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert table.main([f"runs={tmp_path}", "format=parquet"]) == 0
    from_parquet = pd.read_parquet(capsys.readouterr().out.strip())
    for frame in (from_csv, from_parquet):
        assert list(frame["perplexity"].dropna()) == [20.0, 21.0, 25.0, 99.0, 30.0]
    assert table.main([f"runs={tmp_path}"]) == 0
    assert "25.00 (1.25x)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=x"], "error: run=x is unknown; expected KEY=VALUE with a key of runs, format, output, into, mark\n"),
        (
            ["runs=/nowhere"],
            "error: runs=/nowhere is no folder; expected one with records, such as results/reference\n",
        ),
        (["format=xml"], "error: format=xml is unknown; expected one of: md, csv, parquet\n"),
        (["runs=results/reference", "into=LICENSE"], "error: into=LICENSE lacks the lines"),
    ],
)
def test_command_line_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(arguments) == 1
    assert capsys.readouterr().err.startswith(message)


def test_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main([f"runs={tmp_path}"]) == 1
    assert "holds no records; run `make bench`" in capsys.readouterr().err


# Which records each generated table is of: file, mark, folder.
QUOTED = [
    ("README.md", "table", "results/reference"),
    ("README.md", "wikitext2", "results/reference/wikitext2"),
    ("README.md", "low_bits", "results/reference/low_bits"),
    ("README.md", "packed", "results/reference/packed"),
    ("results/README.md", "table", "results/reference"),
    ("results/README.md", "wikitext2", "results/reference/wikitext2"),
    ("results/README.md", "low_bits", "results/reference/low_bits"),
    ("results/README.md", "packed", "results/reference/packed"),
]


@pytest.mark.parametrize(("name", "mark", "folder"), QUOTED)
def test_the_quoted_table_is_the_table_of_the_reference_records(name: str, mark: str, folder: str) -> None:
    records = table.load(ROOT / folder)
    assert len(records) >= 10
    _, quoted, _ = table.between((ROOT / name).read_text(), mark)
    assert quoted.strip() == table.to_markdown(table.to_frame(records)).strip(), "run `make readme`"


def test_reference_records_hold_no_path_of_the_machine_that_made_them() -> None:
    paths = list((ROOT / "results/reference").rglob("*.json"))
    assert paths
    for path in paths:
        for word in ("/home/", "/root/", "/work/", "/tmp/", "C:\\\\"):
            assert word not in path.read_text(), f"{path.name} holds {word}"
