"""The table: ratios to the right baseline, noise, ranks, seeds, every format, and a README that quotes the records."""

from __future__ import annotations

import io
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from harness.cli import table as command
from harness.records import Environment, Execution, Record, Text, Texts, Weights, write
from harness.records.folder import load_records, read_tables
from harness.records.metrics import METRICS
from harness.reports import Sheet, mean_over_seeds, render, table, to_frame
from harness.reports.cells import STALE, STALE_NOTE, display
from harness.reports.frame import measured
from harness.reports.intervals import difference, interval
from harness.reports.markdown import between
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def nothing_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "stale_ids", lambda _: set())


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
        model=Weights(fingerprint="f"),
        execution=Execution(mode="packed", dtype=dtype, baseline_dtype="float32", device="cpu"),
        data=Texts(protocol="gptq-8", evaluation=Text(source="d", num_windows=2, seq_len=8, tokens_sha256=tokens)),
        metrics={} if perplexity is None else {"perplexity": perplexity, "model_size_mib": 10.0, "decode_speedup": 0.5},
    )


NLL = [3.0, 3.2, 2.8, 3.1, 2.9, 3.3, 2.7, 3.05]
WOBBLE = [0.01, -0.02, 0.015, 0.005, -0.01, 0.02, -0.015, 0.001]


def scored(run_id: str, nll: list[float], method: str = "rtn", seed: int = 0, **more: Any) -> Record:
    mean = math.fsum(nll) / len(nll)
    made = make(run_id, math.exp(mean), method, **more)
    made.window_nll = nll
    made.metrics["nll"] = mean
    made.config["seed"] = seed
    return made


RECORDS = [
    make("c", 30.0, bits=3),
    make("b", 25.0),
    make("a", 20.0, "none"),
    make("h", 21.0, "none", "bfloat16"),
    make("o", 99.0, tokens="other text"),
    make("x", None, bits=2),
]


def test_ratios_are_to_the_float_run_of_the_same_text() -> None:
    frame = to_frame(RECORDS).set_index("run_id")
    assert frame.loc["b", "perplexity_ratio"] == 1.25
    assert frame.loc["a", "perplexity_ratio"] == 1.0
    assert frame.loc["h", "perplexity_ratio"] == 1.05
    assert pd.isna(frame.loc["o", "perplexity_ratio"])
    assert pd.isna(frame.loc["x", "perplexity"])
    assert frame.loc["c", "model_size_mib_ratio"] == 1.0
    assert list(frame.index) == ["a", "h", "b", "o", "c", "x"]


def test_a_quantized_cache_is_no_float_baseline() -> None:
    coded = make("k", 40.0, "none")
    coded.execution = replace(coded.execution, kv="kv4_token residual=8")
    plain = make("a", 20.0, "none")
    coded.metrics["kv_mib"], plain.metrics["kv_mib"] = 2.0, 8.0
    frame = to_frame([coded, plain, RECORDS[1]]).set_index("run_id")
    assert frame.loc["k", "perplexity_ratio"] == 2.0
    assert frame.loc["b", "perplexity_ratio"] == 1.25
    assert "| 2.00 (0.25x) |" in table.to_markdown(frame.reset_index(), "all")
    assert "| kv4_token residual=8 " in table.to_markdown(frame.reset_index())
    assert " kv " not in table.to_markdown(to_frame(RECORDS))


def test_rows_of_other_calibration_are_told_apart_and_a_shared_one_is_named() -> None:
    def calibrated(run_id: str, sampling: str) -> Record:
        found = make(run_id, 25.0, "gptq")
        calibration = Text(source="c", sampling=sampling, num_windows=8, seq_len=512)
        found.data = replace(found.data, calibration=calibration)
        return found

    one, other = calibrated("g", "first"), calibrated("r", "random")
    assert "| 8 x 512 tokens of c, random " in table.to_markdown(to_frame([RECORDS[2], one, other]))
    same = table.to_markdown(to_frame([RECORDS[2], one]))
    assert "calibration 8 x 512 tokens of c, dtype" in same
    assert "| calibration" not in same


def test_caches_by_batch_and_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, coded, simulated = make("a", 20.0, "none"), make("k", 21.0, "none"), make("s", 22.0)
    coded.execution = replace(coded.execution, kv="kv4_token")
    for found, slope in ((plain, 4096.0), (coded, 1024.0)):
        found.metrics["kv_bytes_per_token"] = slope
        found.kv = [{"batch": b, "length": 2048, "mib": slope * b * 2048 / 2**20} for b in (1, 32)]
    for found in (coded, plain, simulated):
        write(found, tmp_path)
    assert command.main([f"runs={tmp_path}", "show=kv"]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == ["kv", "bytes / token", "1 x 2048", "32 x 2048"]
    assert lines[4:6] == [
        ["none", "4,096 (1.00x)", "8.0 (1.00x)", "256 (1.00x)"],
        ["kv4_token", "1,024 (0.25x)", "2.0 (0.25x)", "64.0 (0.25x)"],
    ]
    assert len(lines) == 6
    for found in (coded, plain):
        (tmp_path / f"{found.run_id}.json").unlink()
    assert command.main([f"runs={tmp_path}", "show=kv"]) == 1
    assert capsys.readouterr().err.startswith("error: show=kv finds no record with figures of a KV cache")


def test_a_failed_run_may_hold_anything() -> None:
    odd = Record(
        run_id="z", status="failed", error="e", config={"method": {"rtn": None}, "scheme": {"weight": {"bits": []}}}
    )
    frame = to_frame(
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
    text = table.to_markdown(to_frame(RECORDS[:3] + RECORDS[5:]))
    assert "model m, data d, protocol gptq-8, windows 2, dtype float32" in text
    assert "25.00 (1.25x)" in text
    assert "failed x: no disk" in text
    assert "| none " in text


def realistic() -> list[Record]:
    """Rows with every metric of the short table, names and figures as long as they get."""

    def row(run_id: str, method: str, scheme: str, **more: Any) -> Record:
        record = scored(run_id, [x + 0.0001 * d for x, d in zip(NLL, WOBBLE, strict=True)], method, **more)
        record.config["scheme"]["name"] = scheme
        metrics = {"kl": 0.00123, "top1_agreement": 1.0, "bits_per_weight": 32.0, "model_size_mib": 513.1}
        metrics |= {"peak_memory_mib": 1114.0, "prefill_ms_p50": 1332.0, "prefill_speedup": 1.771}
        metrics |= {"decode_ms_p50": 275.0, "decode_speedup": 0.132, "quantize_s": 1320.8, "resident_mib": 1513.1}
        record.metrics |= metrics | {"quantize_peak_mib": 11512.0}
        record.execution = replace(record.execution, kernel="bitsandbytes")
        return record

    rows = [row("a", "none", "group64"), row("h", "none", "group64", dtype="bfloat16")]
    return [*rows, row("s", "smoothquant", "w8a8_static", bits=8), row("r", "rotate_gptq", "w4a4_token")]


def on_a_terminal(sheet: Sheet, width: int) -> list[str]:
    out = io.StringIO()
    render.draw(sheet, Console(width=width, file=out))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("records", [RECORDS, realistic()], ids=["few", "realistic"])
def test_the_short_table_fits_a_terminal_with_every_figure_whole(records: list[Record], width: int) -> None:
    sheet = table.to_sheet(to_frame(records))
    lines = on_a_terminal(sheet, width)
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("──") for line in lines) == 1, "one table"
    text = "\n".join(lines)
    assert "…" not in text
    for name in sheet.figures:
        for cell in sheet.shown[name]:
            assert all(part in text for part in cell.rstrip(")").split(" (")), cell


def test_a_wide_terminal_has_a_line_for_each_row_and_a_narrow_one_ratios_below_figures() -> None:
    sheet = table.to_sheet(to_frame(realistic()))
    wide, narrow = on_a_terminal(sheet, 120), on_a_terminal(sheet, 80)
    (row,) = [line for line in wide if "smoothquant" in line]
    assert row.split() == [
        *["smoothquant", "w8a8_static", "8", "float32", "20.21", "(1.00x)", "0.00123", "100.0%", "32.000"],
        *["513.1", "1114", "1.77x", "0.13x"],
    ]
    place = next(i for i, line in enumerate(narrow) if line.startswith("smoothquant"))
    assert narrow[place].split()[:3] == ["smoothquant", "20.21", "0.00123"]
    assert narrow[place + 1].split() == ["w8a8_static", "8", "float32", "1.00x"]


@pytest.mark.parametrize(("width", "parts"), [(120, 1), (80, 2)])
def test_all_columns_fit_in_as_many_tables_as_a_terminal_needs(width: int, parts: int) -> None:
    lines = on_a_terminal(table.to_sheet(to_frame(realistic()), "all"), width)
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("──") for line in lines) == parts
    assert sum(line.startswith("smoothquant") for line in lines) == parts, "each names its rows"
    assert "…" not in "\n".join(lines)


def test_the_short_table_names_its_rows_by_as_few_columns_as_tell_them_apart() -> None:
    one, two, other = make("p", 1.0), make("q", 2.0), make("r", 3.0, bits=3)
    other.execution = replace(other.execution, mode="simulated")
    assert list(display(to_frame([one, other]))) == ["method", "scheme", "bits", "perplexity", "size MiB"]
    two.execution = replace(two.execution, kernel="k")
    frame = to_frame([one, two, other])
    assert list(display(frame)["execution"]) == ["packed", "packed: k", "simulated"]
    two.options = {"rtn.shrink": 0.7}
    assert "execution" not in display(to_frame([one, two, other]))
    assert "execution" in display(to_frame([one, two, other]), "all")


def test_times_are_speedups_in_the_short_table() -> None:
    frame = to_frame(realistic())
    assert list(display(frame)["decode"]) == ["0.13x"] * 4
    assert list(display(frame, "all")["decode ms"]) == ["275.0 (0.13x)"] * 4
    assert "rank" not in display(frame)


def test_compiled_and_eager_times_are_told_apart() -> None:
    eager, slow = make("a", 20.0), make("b", 20.0, method="gptq")
    fast = make("c", 20.0)
    fast.config["measure"] = {"runtime": "compiled"}
    shown = display(to_frame([eager, slow, fast]))
    assert list(shown["runtime"]) == ["eager", "eager", "compiled"]
    for alone, expected in ((fast, ", runtime compiled;"), (eager, "")):
        sheet = table.to_sheet(to_frame([alone]))
        assert "runtime" not in sheet.shown
        assert expected in sheet.head[0]
        assert ("runtime" in sheet.head[0]) == bool(expected)


def test_times_of_other_batches_and_prompts_are_told_apart() -> None:
    runs = [make(name, 20.0) for name in "abc"]
    for run, measure in zip(runs, ((1, 128), (8, 128), (8, 512)), strict=True):
        run.config["measure"] = dict(zip(("batch_size", "prompt_len"), measure, strict=True))
    shown = display(to_frame(runs[:2]))
    assert list(shown["batch"]) == ["1", "8"]
    assert "prompt" not in shown
    assert list(display(to_frame(runs))["prompt"]) == ["128", "128", "512"]


def test_the_head_is_wrapped_and_the_table_is_not() -> None:
    text = table.to_markdown(to_frame(realistic()))
    head, rows, *_ = text.split("\n\n")
    assert len(head.split("\n")) > 1
    assert max(map(len, head.split("\n"))) <= 120
    assert len({len(line) for line in rows.strip().split("\n")}) == 1, "padded"


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    odd = make("p", 1.0)
    odd.options = {"rtn.pattern": "a|b"}
    text = table.to_markdown(to_frame([odd, make("q", 2.0)]))
    assert r"pattern=a\|b" in text


# Results of other code.


def test_stale_rows_have_one_sign_and_one_line_explains_it() -> None:
    frame = to_frame(RECORDS, stale={"b", "unknown"})
    assert list(frame.loc[frame["stale"], "run_id"]) == ["b"]
    for columns in ("short", "quality", "all"):
        text = table.to_markdown(frame, columns)
        (row,) = [line for line in text.splitlines() if line.startswith("|") and STALE in line]
        assert row.startswith(f"| rtn {STALE} ")
        assert "25.00" in row
        assert text.splitlines()[-1] == STALE_NOTE
    assert STALE not in table.to_markdown(to_frame(RECORDS))
    assert r"rtn $\dagger$" in render.as_latex(table.to_sheet(frame))


def test_a_mean_over_seeds_is_stale_if_one_of_its_runs_is() -> None:
    runs = mean_over_seeds([scored("p", NLL), scored("q", NLL, seed=1), scored("r", NLL, "gptq")])
    frame = to_frame(runs, stale={"q"}).set_index("run_id")
    assert dict(frame["stale"]) == {"p+q": True, "r": False}


@pytest.mark.parametrize(("choice", "runs"), [("mark", "ahbocx"), ("hide", "ahocx"), ("list", "b")])
def test_stale_rows_can_be_hidden_or_listed(
    choice: str, runs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "stale_ids", lambda _: {"b"})
    for record in RECORDS:
        write(record, tmp_path)
    assert command.main([f"runs={tmp_path}", f"stale={choice}", "format=csv"]) == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert "".join(frame["run_id"]) == runs
    assert list(frame["run_id"][frame["stale"]]) == (["b"] if choice != "hide" else [])
    if choice == "list":
        assert list(frame["perplexity_ratio"]) == [1.25], "the baseline is of today's code, and still the baseline"


def test_no_stale_row_is_an_empty_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(RECORDS[0], tmp_path)
    assert command.main([f"runs={tmp_path}", "stale=list"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n| ") == 2, "headings and their rule"
    assert text.endswith("\nno rows\n")


# Tables by name.


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """A folder of committed records: runs, and a file that says which of them each table shows."""
    folder = tmp_path / "reference"
    for record in RECORDS:
        write(record, folder / "runs")
    (folder / "tables.yaml").write_text(
        "few: {title: Two rows, runs: [b, c]}\n"
        "whole: {columns: all}\n"
        "caches: {show: kv, runs: [k, a]}\n"
        "lost: {runs: [b, gone]}\n"
    )
    return folder


def test_a_table_has_its_rows_its_title_and_ratios_to_baselines_that_it_does_not_show(
    reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([f"runs={reference}", "table=few"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Two rows\n\nmodel m,")
    assert re.findall(r"(\d\d\.00) \((.*?)\)", text) == [("25.00", "1.25x"), ("30.00", "1.50x")]
    assert "execution" not in text
    assert command.main([f"runs={reference}", "table=few", "columns=all"]) == 0
    assert "| execution |" in capsys.readouterr().out
    assert command.main([f"runs={reference}", "table=whole"]) == 0
    assert "| execution |" in capsys.readouterr().out


def test_a_table_may_show_means_over_seeds(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, value in ((0, 20.0), (1, 30.0)):
        record = make(f"seed{seed}", value, "gptq")
        record.config |= {"seed": seed}
        write(record, reference / "runs")
    with (reference / "tables.yaml").open("a") as file:
        file.write("seeds: {runs: [seed0, seed1], seeds: mean}\n")
    assert command.main([f"runs={reference}", "table=seeds"]) == 0
    text = capsys.readouterr().out
    assert "25.00" in text
    assert text.count("| gptq ") == 1


def test_a_folder_with_tables_shows_all_its_runs_without_a_name(
    reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([f"runs={reference}", "format=csv"]) == 0
    assert len(pd.read_csv(io.StringIO(capsys.readouterr().out))) == len(RECORDS)


def test_a_table_says_what_it_shows(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run_id, kv in (("a", None), ("k", "kv4_token")):
        record = make(run_id, 20.0, "none")
        record.execution = replace(record.execution, kv=kv)
        record.kv = [{"batch": 1, "length": 2048, "mib": 8.0}]
        write(record, reference / "runs")
    assert command.main([f"runs={reference}", "table=caches"]) == 0
    assert "1 x 2048" in capsys.readouterr().out


def test_a_table_goes_between_the_marks_of_its_name(reference: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.md"
    target.write_text("before\n<!-- few:begin -->\nold\n<!-- few:end -->\nafter\n")
    assert command.main([f"runs={reference}", "table=few", f"into={target}"]) == 0
    head, part, tail = between(target.read_text(), "few")
    assert (head, tail) == ("before\n<!-- few:begin -->", "<!-- few:end -->\nafter\n")
    assert part.startswith("\nTwo rows\n\n")
    assert part.endswith(" |\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table=fev"], "error: table=fev is unknown; did you mean few? expected one of: few, whole, caches, lost\n"),
        (["table=lost"], "tables.yaml names run gone, which "),
        (["table=few", "into=LICENSE"], "error: into=LICENSE lacks the lines <!-- few:begin --> and <!-- few:end -->"),
        (["table=few", "show=kv"], "error: show=kv means nothing with table=few; drop one of them\n"),
        (["table=few", "compare=a,b"], "error: table=few means nothing with compare=a,b; drop one of them\n"),
        (["columns=some"], "error: columns=some is unknown; expected one of: short, quality, all\n"),
        (["stale=no"], "error: stale=no is unknown; expected one of: mark, hide, list\n"),
    ],
)
def test_errors_of_tables_are_one_line(
    reference: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [] if "compare=a,b" in arguments else [f"runs={reference}"]
    assert command.main([*runs, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("few: {rows: [b]}", "few.rows=['b'] is an unknown key; expected one of: title, show, runs, columns, seeds"),
        ("few: {columns: some}", "few.columns='some' is unknown; expected one of: short, quality, all"),
        ("- few", "cannot be read"),
    ],
)
def test_a_file_of_tables_that_cannot_be_read_is_named(
    reference: Path, entry: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (reference / "tables.yaml").write_text(entry)
    assert command.main([f"runs={reference}", "table=few"]) == 1
    error = capsys.readouterr().err
    assert f"{reference / 'tables.yaml'} cannot be read" in error
    assert message in error
    (reference / "tables.yaml").unlink()
    assert command.main([f"runs={reference}", "table=few"]) == 1
    assert "has no tables.yaml; name a folder that has one" in capsys.readouterr().err


def test_options_tell_rows_apart() -> None:
    one, two = make("p", 1.0), make("q", 2.0)
    one.options = {"rtn.shrink": 0.7}
    two.config["scheme"]["weight"] |= {"grid": "narrow", "group_size": 32, "scale_dtype": "float16"}
    frame = to_frame([one, two]).set_index("run_id")
    assert frame.loc["p", "options"] == "shrink=0.7"
    assert frame.loc["q", "options"] == "grid=narrow group_size=32"
    assert "| shrink=0.7 " in table.to_markdown(frame.reset_index())


def test_load_names_what_is_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(RECORDS[0], tmp_path)
    (tmp_path / "other.json").write_text("[]")
    assert [found.run_id for found in load_records(tmp_path)] == ["c"]
    assert "other.json is not a record" in capsys.readouterr().err
    with pytest.raises(ValueError, match="runs=.*gone is no folder"):
        load_records(tmp_path / "gone")


def test_intervals_stand_in_the_frame() -> None:
    base, worse = scored("a", NLL, "none"), scored("b", [x + 0.5 + d for x, d in zip(NLL, WOBBLE, strict=True)])
    frame = to_frame([base, worse]).set_index("run_id")
    _, low, high = difference(worse, base).ratio
    assert list(frame.loc["b", ["perplexity_ratio_low", "perplexity_ratio_high"]]) == [low, high]
    assert low < math.exp(0.5) < high
    assert list(frame.loc["a", ["perplexity_ratio_low", "perplexity_ratio_high"]]) == [1.0, 1.0]
    assert list(frame.loc["a", ["perplexity_low", "perplexity_high"]]) == list(interval(NLL).ratio[1:])
    assert frame.loc["b", "interval"] == "bootstrap"


def test_a_ratio_within_noise_is_marked_and_the_mark_explained() -> None:
    noise = scored("b", [x + d for x, d in zip(NLL, WOBBLE, strict=True)])
    equal = scored("c", NLL, bits=8)
    worse = scored("d", [x + 0.5 + d for x, d in zip(NLL, WOBBLE, strict=True)], bits=3)
    text = table.to_markdown(to_frame([scored("a", NLL, "none"), noise, equal, worse]))
    assert text.count("(≈1.00x)") == 1
    assert "(1.65x)" in text
    assert "≈: its 95% interval over windows contains 1" in text
    assert "≈" not in table.to_markdown(to_frame([scored("a", NLL, "none"), equal, worse]))


def test_rows_that_tie_share_their_ranks() -> None:
    shifts = {"b": 0.2, "c": 0.0, "d": 0.5}
    near = scored("e", [x + 0.2 + d for x, d in zip(NLL, WOBBLE, strict=True)], bits=7)
    runs = [scored(run, [x + shift for x in NLL], bits=bits) for bits, (run, shift) in enumerate(shifts.items(), 3)]
    elsewhere, single, blank = scored("t", NLL, tokens="u"), scored("s", [9.0], tokens="v"), make("x", 5.0, tokens="w")
    frame = to_frame([*runs, near, elsewhere, single, blank])
    shown = dict(zip(frame["run_id"], display(frame, "all")["rank"], strict=True))
    assert shown == {"c": "1", "b": "2-3", "e": "2-3", "d": "4", "t": "1", "s": "-", "x": "-"}


def test_records_beside_give_baselines_and_no_rows() -> None:
    frame = to_frame([scored("b", [x + 0.5 for x in NLL])], [scored("a", NLL, "none"), scored("z", NLL, bits=2)])
    assert list(frame["run_id"]) == ["b"]
    assert frame["perplexity_ratio"][0] == pytest.approx(math.exp(0.5))
    assert list(frame["rank_high"]) == [1]


def test_divergence_is_shown_where_it_was_measured() -> None:
    one, two = make("a", 20.0, "none"), make("b", 25.0)
    assert "KL" not in display(to_frame([one, two]))
    two.metrics |= {"kl": 0.01234, "top1_agreement": 0.9518}
    shown = display(to_frame([one, two]))
    assert list(shown["KL"]) == ["-", "0.0123"]
    assert list(shown["top-1"]) == ["-", "95.2%"]


def test_mean_over_seeds() -> None:
    runs = [scored(f"r{seed}", [x + 0.1 * seed for x in NLL], "gptq", seed) for seed in range(3)]
    frame = to_frame(mean_over_seeds([scored("a", NLL, "none"), *runs, make("x", None, bits=2)]))
    row = frame[frame["method"] == "gptq"].iloc[0]
    perplexities = [run.metrics["perplexity"] for run in runs]
    assert row["seeds"] == 3
    assert row["perplexity"] == pytest.approx(statistics.mean(perplexities))
    assert row["perplexity_sd"] == pytest.approx(statistics.stdev(perplexities))
    assert row["nll"] == pytest.approx(3.00625 + 0.1)
    assert row["run_id"] == "r0+r1+r2"
    shown = display(frame)
    assert f"{row['perplexity']:.2f} ± {row['perplexity_sd']:.2f} (" in shown["perplexity"][1]
    assert list(shown["seeds"]) == ["1", "3", "-"]
    assert "seed" not in shown


def test_the_table_of_quality_has_intervals_and_ranks_and_no_times() -> None:
    runs = [scored("a", NLL, "none"), scored("r", [x + 0.1 + w for x, w in zip(NLL, WOBBLE, strict=True)])]
    for run in runs:
        run.window_kl = [0.0] * len(NLL) if run.run_id == "a" else NLL
        run.metrics |= {"kl": statistics.mean(run.window_kl), "peak_memory_mib": 7.0}
    sheet = table.to_sheet(to_frame(runs), "quality")
    ratio, kl = difference(runs[1], runs[0]).ratio, interval(NLL)
    assert list(sheet.shown["95% of ratio"]) == ["-", f"{ratio[1]:.3f}-{ratio[2]:.3f}"]
    assert list(sheet.shown["95% of KL"]) == ["-", f"{kl.low:.3g}-{kl.high:.3g}"]
    assert list(sheet.shown["rank"]) == ["1", "2"]
    assert list(sheet.figures) == ["perplexity", "95% of ratio", "KL", "95% of KL", "size MiB"]
    assert "; 95%: interval over windows; rank: " in sheet.head[0]


def test_a_table_names_the_processor_of_its_times() -> None:
    one, two = make("p", 25.0), make("q", 26.0, bits=3)
    one.environment = Environment(cpu="Some CPU", threads=2, native="amx")
    assert "Some CPU, 2 threads, amx; with x" in table.to_markdown(to_frame([one]))
    two.environment = replace(one.environment, native="avx2")
    found = table.to_markdown(to_frame([one, two]), "all")
    assert "| Some CPU, 2 threads, amx " in found
    assert "| Some CPU, 2 threads, avx2 " in found
    del one.metrics["decode_speedup"], two.metrics["decode_speedup"]
    assert "Some CPU" not in table.to_markdown(to_frame([one, two]), "all")
    timed = replace(one, metrics={"prefill_speedup": 2.0}, execution=replace(one.execution, device="cuda:0"))
    timed.environment = replace(one.environment, gpu="Some GPU")
    assert "device cuda:0, processor Some GPU;" in table.to_markdown(to_frame([timed]))


def test_seeds_of_steps_are_seeds_and_other_options_are_not() -> None:
    runs = [scored("p", NLL), scored("q", NLL), scored("r", NLL)]
    runs[1].options = {"rtn.seed": 1}
    runs[2].options = {"rtn.shrink": 0.5}
    assert {found.run_id for found in mean_over_seeds(runs)} == {"p+q", "r"}
    with pytest.raises(ValueError, match="seeds=mean: runs p and s are both m rtn .* with seed 0; expected one"):
        mean_over_seeds([*runs, scored("s", NLL)])


def test_a_figure_that_one_seed_lacks_is_absent() -> None:
    runs = [scored("p", NLL), scored("q", NLL, seed=1)]
    del runs[1].metrics["perplexity"]
    (found,) = mean_over_seeds(runs)
    assert "perplexity" not in found.metrics
    assert found.metrics["decode_speedup"] == 0.5


def test_the_seed_is_shown_where_it_varies() -> None:
    assert "seed" not in display(to_frame(RECORDS))
    shown = display(to_frame([scored("p", NLL), scored("q", NLL, seed=7)]))
    assert list(shown["seed"]) == ["0", "7"]


def test_latex_escapes_text_and_closes_what_it_opens() -> None:
    odd = scored("b", [x + d for x, d in zip(NLL, WOBBLE, strict=True)])
    odd.options = {"rtn.ratio_of": "50%&{x}"}
    text = render.as_latex(table.to_sheet(to_frame([scored("a", NLL, "none"), odd])))
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 3
    assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1
    assert r"ratio\_of=50\%\&\{x\}" in text
    assert r"($\approx$1.00x)" in text
    for word in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}", r"\end{tabular}"):
        assert text.count(word) == 1
    assert not set(text) - set(map(chr, range(128))) - set("".join(x for x in text.splitlines() if x.startswith("%")))


def test_command_line_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for found in RECORDS:
        write(found, tmp_path)
    assert command.main([f"runs={tmp_path}", "format=csv"]) == 0
    from_csv = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert command.main([f"runs={tmp_path}", "format=parquet"]) == 0
    from_parquet = pd.read_parquet(capsys.readouterr().out.strip())
    for frame in (from_csv, from_parquet):
        assert list(frame["perplexity"].dropna()) == [20.0, 21.0, 25.0, 99.0, 30.0]
    target = tmp_path / "table.tex"
    assert command.main([f"runs={tmp_path}", "format=latex", f"output={target}", "seeds=mean"]) == 0
    assert "25.00 (1.25x) &" in target.read_text()
    assert command.main([f"runs={tmp_path}"]) == 0
    assert "25.00 (1.25x)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run=x"],
            "error: run=x is unknown; did you mean runs? expected one of: runs, table, compare, show, columns, failed, "
            "and 6 more (--help lists all)\n",
        ),
        (
            ["runs=/nowhere"],
            "error: runs=/nowhere is no folder; expected one with records, such as results/reference\n",
        ),
        (["format=xml"], "error: format=xml is unknown; expected one of: md, csv, parquet, latex\n"),
        (["seeds=some"], "error: seeds=some is unknown; expected one of: all, mean\n"),
        (["compare=a,b", "runs=c"], "error: runs=c means nothing with compare=a,b; drop one of them\n"),
        (["into=README.md", "format=latex"], "error: format=latex means nothing with into=README.md; drop one"),
    ],
)
def test_command_line_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 1
    assert capsys.readouterr().err.startswith(message)


def test_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([f"runs={tmp_path}"]) == 1
    assert "holds no records; run `make bench`" in capsys.readouterr().err


REFERENCE = ROOT / "results/reference"
NAMES = {"table": "readme"}  # the one table whose mark is not its name
QUOTED = [
    (document, mark, NAMES.get(mark, mark))
    for document in ("README.md", "docs/results.md")
    for mark in re.findall(r"^<!-- (\w+):begin -->$", (ROOT / document).read_text(), re.MULTILINE)
]


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown text without the signs of stale rows, which come and go with the code."""
    lines = text.replace(f" {STALE}", "").replace(STALE_NOTE, "").split("\n")
    return [[cell.strip(" -:") for cell in line.split("|")] for line in lines if line.strip()]


@pytest.mark.parametrize(("document", "mark", "name"), QUOTED)
def test_a_quoted_table_is_the_table_of_the_reference_records(
    document: str, mark: str, name: str, tmp_path: Path
) -> None:
    output = tmp_path / "table.md"
    assert command.main([f"runs={REFERENCE}", f"table={name}", f"output={output}"]) == 0
    _, quoted, _ = between((ROOT / document).read_text(), mark)
    assert cells(quoted) == cells(output.read_text()), "run `make readme`"


def test_every_table_of_the_reference_is_quoted_once() -> None:
    assert sorted(name for *_, name in QUOTED) == sorted(read_tables(REFERENCE))


def test_reference_records_hold_no_path_of_the_machine_that_made_them() -> None:
    paths = list((ROOT / "results/reference").rglob("*.json"))
    assert paths
    for path in paths:
        for word in ("/home/", "/root/", "/work/", "/tmp/", "C:\\\\"):
            assert word not in path.read_text(), f"{path.name} holds {word}"


def test_a_metric_with_its_usual_value_in_all_rows_has_no_column() -> None:
    rows = [{metric.name: 1.0 for metric in METRICS} | {"kv": "none", "quantized_share": share} for share in (1.0, 0.5)]
    names = [[metric.name for metric in measured(pd.DataFrame(part))] for part in (rows[:1], rows)]
    assert ["quantized_share" in columns for columns in names] == [False, True]
