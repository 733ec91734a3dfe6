"""The table: ratios to the right baseline, noise, ranks, seeds, every format, and a README that quotes the records."""

from __future__ import annotations

import io
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from harness.cli import table
from harness.records import Record, store
from harness.reports import render
from harness.reports.intervals import difference, interval
from harness.reports.kv_table import kv_sheet
from harness.reports.seeds import mean_over_seeds
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


def test_a_quantized_cache_is_no_float_baseline() -> None:
    coded = make("k", 40.0, "none")
    coded.execution.kv = "kv4_token residual=8"
    plain = make("a", 20.0, "none")
    coded.metrics["kv_mib"], plain.metrics["kv_mib"] = 2.0, 8.0
    frame = table.to_frame([coded, plain, RECORDS[1]]).set_index("run_id")
    assert frame.loc["k", "perplexity_ratio"] == 2.0
    assert frame.loc["b", "perplexity_ratio"] == 1.25
    assert "2.00 (0.25x)" in table.to_markdown(frame.reset_index())
    assert "| kv4_token residual=8 " in table.to_markdown(frame.reset_index())
    assert " kv " not in table.to_markdown(table.to_frame(RECORDS))


def test_rows_of_other_calibration_are_told_apart_and_a_shared_one_is_named() -> None:
    def calibrated(run_id: str, sampling: str) -> Record:
        found = make(run_id, 25.0, "gptq")
        found.data["calibration"] = {"source": "c", "sampling": sampling, "num_windows": 8, "seq_len": 512}
        return found

    one, other = calibrated("g", "first"), calibrated("r", "random")
    assert "| 8 x 512 tokens of c, random " in table.to_markdown(table.to_frame([RECORDS[2], one, other]))
    same = table.to_markdown(table.to_frame([RECORDS[2], one]))
    assert "calibration 8 x 512 tokens of c, dtype" in same
    assert "| calibration" not in same


def test_caches_by_batch_and_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, coded, simulated = make("a", 20.0, "none"), make("k", 21.0, "none"), make("s", 22.0)
    coded.execution.kv = "kv4_token"
    for found, slope in ((plain, 4096.0), (coded, 1024.0)):
        found.metrics["kv_bytes_per_token"] = slope
        found.kv = [{"batch": b, "length": 2048, "mib": slope * b * 2048 / 2**20} for b in (1, 32)]
    for found in (coded, plain, simulated):
        store.write(found, tmp_path)
    assert table.main([f"runs={tmp_path}", "show=kv"]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == ["kv", "bytes / token", "1 x 2048", "32 x 2048"]
    assert lines[4:6] == [
        ["none", "4,096 (1.00x)", "8.0 (1.00x)", "256 (1.00x)"],
        ["kv4_token", "1,024 (0.25x)", "2.0 (0.25x)", "64.0 (0.25x)"],
    ]
    assert len(lines) == 6 + 1
    for found in (coded, plain):
        (tmp_path / f"{found.run_id}.json").unlink()
    assert table.main([f"runs={tmp_path}", "show=kv"]) == 1
    assert capsys.readouterr().err.startswith("error: show=kv finds no record with figures of a KV cache")


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
    Console(width=80, file=out).print(render.drawn(table.to_sheet(table.to_frame(RECORDS))))
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
    store.write(RECORDS[0], tmp_path)
    (tmp_path / "other.json").write_text("[]")
    assert [found.run_id for found in table.load(tmp_path)] == ["c"]
    assert "other.json is no record" in capsys.readouterr().err
    with pytest.raises(ValueError, match="runs=.*gone is no folder"):
        table.load(tmp_path / "gone")


NLL = [3.0, 3.2, 2.8, 3.1, 2.9, 3.3, 2.7, 3.05]
WOBBLE = [0.01, -0.02, 0.015, 0.005, -0.01, 0.02, -0.015, 0.001]


def scored(run_id: str, nll: list[float], method: str = "rtn", seed: int = 0, **more: Any) -> Record:
    mean = math.fsum(nll) / len(nll)
    made = make(run_id, math.exp(mean), method, **more)
    made.window_nll = nll
    made.metrics["nll"] = mean
    made.config["seed"] = seed
    return made


def test_intervals_stand_in_the_frame() -> None:
    base, worse = scored("a", NLL, "none"), scored("b", [x + 0.5 + d for x, d in zip(NLL, WOBBLE, strict=True)])
    frame = table.to_frame([base, worse]).set_index("run_id")
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
    text = table.to_markdown(table.to_frame([scored("a", NLL, "none"), noise, equal, worse]))
    assert text.count("(≈1.00x)") == 1
    assert "(1.65x)" in text
    assert "≈: its 95% interval over windows holds 1" in text
    assert "≈" not in table.to_markdown(table.to_frame([scored("a", NLL, "none"), equal, worse]))


def test_rows_that_tie_share_their_ranks() -> None:
    shifts = {"b": 0.2, "c": 0.0, "d": 0.5}
    near = scored("e", [x + 0.2 + d for x, d in zip(NLL, WOBBLE, strict=True)], bits=7)
    runs = [scored(run, [x + shift for x in NLL], bits=bits) for bits, (run, shift) in enumerate(shifts.items(), 3)]
    elsewhere, single, blank = scored("t", NLL, tokens="u"), scored("s", [9.0], tokens="v"), make("x", 5.0, tokens="w")
    frame = table.to_frame([*runs, near, elsewhere, single, blank])
    shown = dict(zip(frame["run_id"], table.display(frame)["rank"], strict=True))
    assert shown == {"c": "1", "b": "2-3", "e": "2-3", "d": "4", "t": "1", "s": "-", "x": "-"}


def test_records_beside_give_baselines_and_no_rows() -> None:
    frame = table.to_frame([scored("b", [x + 0.5 for x in NLL])], [scored("a", NLL, "none"), scored("z", NLL, bits=2)])
    assert list(frame["run_id"]) == ["b"]
    assert frame["perplexity_ratio"][0] == pytest.approx(math.exp(0.5))
    assert list(frame["rank_high"]) == [1]


def test_divergence_is_shown_where_it_was_measured() -> None:
    one, two = make("a", 20.0, "none"), make("b", 25.0)
    assert "KL" not in table.display(table.to_frame([one, two]))
    two.metrics |= {"kl": 0.01234, "top1_agreement": 0.9518}
    shown = table.display(table.to_frame([one, two]))
    assert list(shown["KL"]) == ["-", "0.0123"]
    assert list(shown["top-1"]) == ["-", "95.2%"]


def test_mean_over_seeds() -> None:
    runs = [scored(f"r{seed}", [x + 0.1 * seed for x in NLL], "gptq", seed) for seed in range(3)]
    frame = table.to_frame(mean_over_seeds([scored("a", NLL, "none"), *runs, make("x", None, bits=2)]))
    row = frame[frame["method"] == "gptq"].iloc[0]
    perplexities = [run.metrics["perplexity"] for run in runs]
    assert row["seeds"] == 3
    assert row["perplexity"] == pytest.approx(statistics.mean(perplexities))
    assert row["perplexity_sd"] == pytest.approx(statistics.stdev(perplexities))
    assert row["nll"] == pytest.approx(3.00625 + 0.1)
    assert row["run_id"] == "r0+r1+r2"
    shown = table.display(frame)
    assert f"{row['perplexity']:.2f} ± {row['perplexity_sd']:.2f} (" in shown["perplexity"][1]
    assert list(shown["seeds"]) == ["1", "3", "-"]
    assert "seed" not in shown


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
    assert "seed" not in table.display(table.to_frame(RECORDS))
    shown = table.display(table.to_frame([scored("p", NLL), scored("q", NLL, seed=7)]))
    assert list(shown["seed"]) == ["0", "7"]


def test_latex_escapes_text_and_closes_what_it_opens() -> None:
    odd = scored("b", [x + d for x, d in zip(NLL, WOBBLE, strict=True)])
    odd.options = {"rtn.ratio_of": "50%&{x}"}
    text = render.latex(table.to_sheet(table.to_frame([scored("a", NLL, "none"), odd])))
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
        store.write(found, tmp_path)
    assert table.main([f"runs={tmp_path}", "format=csv"]) == 0
    from_csv = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert table.main([f"runs={tmp_path}", "format=parquet"]) == 0
    from_parquet = pd.read_parquet(capsys.readouterr().out.strip())
    for frame in (from_csv, from_parquet):
        assert list(frame["perplexity"].dropna()) == [20.0, 21.0, 25.0, 99.0, 30.0]
    target = tmp_path / "table.tex"
    assert table.main([f"runs={tmp_path}", "format=latex", f"output={target}", "seeds=mean"]) == 0
    assert "25.00 (1.25x) &" in target.read_text()
    assert table.main([f"runs={tmp_path}"]) == 0
    assert "25.00 (1.25x)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run=x"],
            "error: run=x is unknown; expected KEY=VALUE with a key of runs, compare, show, seeds, format, output, "
            "into, mark",
        ),
        (
            ["runs=/nowhere"],
            "error: runs=/nowhere is no folder; expected one with records, such as results/reference\n",
        ),
        (["format=xml"], "error: format=xml is unknown; expected one of: md, csv, parquet, latex\n"),
        (["seeds=some"], "error: seeds=some is unknown; expected one of: all, mean\n"),
        (["compare=a,b", "runs=c"], "error: runs=c means nothing beside compare=a,b; drop one of them\n"),
        (["into=README.md", "format=latex"], "error: format=latex means nothing beside into=README.md; drop one"),
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
_FOLDERS = {
    "table": "results/reference",
    "wikitext2": "results/reference/wikitext2",
    "low_bits": "results/reference/low_bits",
    "packed": "results/reference/packed",
    "mixed": "results/reference/mixed",
}
_LONG = {name: f"results/reference/{name}" for name in ("survey", "pareto", "kv")}  # in results/README.md alone
QUOTED = [(name, *item) for name in ("README.md", "results/README.md") for item in _FOLDERS.items()]
QUOTED += [("results/README.md", *item) for item in _LONG.items()]


@pytest.mark.parametrize(("name", "mark", "folder"), QUOTED)
def test_the_quoted_table_is_the_table_of_the_reference_records(name: str, mark: str, folder: str) -> None:
    records = table.load(ROOT / folder)
    assert len(records) >= 8
    _, quoted, _ = table.between((ROOT / name).read_text(), mark)
    assert quoted.strip() == table.to_markdown(table.to_frame(records)).strip(), "run `make readme`"


def test_the_quoted_sweep_is_the_one_of_the_survey() -> None:
    sheet = table.sweeps_sheet(ROOT / "results/reference/survey")
    _, quoted, _ = table.between((ROOT / "README.md").read_text(), "sweeps")
    assert quoted.strip() == table.markdown(sheet).strip(), "run `make readme`"


def test_the_quoted_caches_are_those_of_the_reference_records() -> None:
    sheet = kv_sheet(table.load(ROOT / "results/reference/kv"))
    _, quoted, _ = table.between((ROOT / "README.md").read_text(), "caches")
    assert quoted.strip() == table.markdown(sheet).strip(), "run `make readme`"


def test_reference_records_hold_no_path_of_the_machine_that_made_them() -> None:
    paths = list((ROOT / "results/reference").rglob("*.json"))
    assert paths
    for path in paths:
        for word in ("/home/", "/root/", "/work/", "/tmp/", "C:\\\\"):
            assert word not in path.read_text(), f"{path.name} holds {word}"
