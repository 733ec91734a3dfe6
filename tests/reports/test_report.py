"""The report: every run is in it, nothing of it is fetched, hostile texts stay texts."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.cli.report import main
from harness.records import Analysis, Environment, Record, write
from harness.reports import to_frame
from harness.reports.cells import STALE, STALE_NOTE
from harness.reports.html import charts, curves, details, layers, names, page, pareto, rows
from tests.reports.test_table import make

HOSTILE = "</script><script>document.title = 'owned'</script><b>&"
METHODS = ("awq", "gptq", "rtn")
NIGHT = {"runs": 3, "wall_s": 100, "stages": {"load": 2}, "own_share": 0.034}


def full(run_id: str, perplexity: float, stored: float, **changes: Any) -> Record:
    """A record with every figure that the report draws."""
    found = make(run_id, perplexity, **changes)
    found.metrics |= {"bits_per_weight": stored, "kl": perplexity / 1000, "model_size_mib": 10 * stored}
    found.metrics |= {"decode_ms_p50": 5.0, "decode_ms_p10": 4.0, "decode_ms_p90": 8.0}
    found.layers = [
        {
            "name": f"model.layers.{block}.{part}",
            "shape": [2, 3],
            "stored_bits": 24,
            "weight_error": 0.1 * block + 0.01 * i,
            "kl_alone": 0.5,
        }
        for block in range(2)
        for i, part in enumerate(("self_attn.q_proj", "mlp.down_proj"))
    ]
    found.environment = Environment(cpu="one", packages={"torch": "2.0"})
    found.stages = {"load": 1.0, "quantize": 3.0}
    return found


def records() -> list[Record]:
    """Float, runs of which one lies far beyond the plot, and a failed run with a hostile message."""
    found = [full("base", 10.0, 32.0, method="none")]
    found += [full(f"r{i}", 9.5 + 2.0**i, 3.0 + i, method=METHODS[i % 3]) for i in range(4)]
    found += [full("far", 100000.0, 2.5, method="rtn", bits=2)]
    found[1].warnings = [HOSTILE]
    found[1].options = {"awq.note": HOSTILE}
    found[2].environment = Environment(cpu="other", packages={"torch": "2.0"})
    failed = make("bad", None, bits=2)
    failed.error = HOSTILE
    return [*found, failed]


def analysed() -> list[Record]:
    found = records()
    magnitudes = {"before": [float(1 + channel % 7) for channel in range(400)], "after": [1.0] * 400}
    found[3].analysis = Analysis(outliers={"model.layers.0.mlp.up_proj": magnitudes})
    return found


def timed(method: str, batch: int, prompt: int, decode: float | None, **changes: Any) -> Record:
    """A run of a latency sweep."""
    found = make(f"{method}{batch}x{prompt}", 10.0, method=method, **changes)
    found.config["measure"] = {"batch_size": batch, "prompt_len": prompt}
    found.metrics |= {"prefill_ms_p50": 100.0 * batch} | ({} if decode is None else {"decode_ms_p50": decode})
    return found


def test_speeds_of_a_latency_sweep_are_curves() -> None:
    sweep = [timed("none", 1, 128, 20.0), timed("none", 8, 128, 40.0), timed("rtn", 1, 128, 10.0)]
    sweep += [timed("rtn", 8, 128, 25.0), timed("rtn", 1, 512, 12.5), timed("rtn", 4, 128, None)]
    drawn = {curve.title: curve for curve in curves.curves(to_frame(sweep))}
    assert list(drawn) == [
        "decode, prompts of 128 tokens",
        "prefill, prompts of 128 tokens",
        "decode, a batch of 1",
        "prefill, a batch of 1",
    ]
    by_batch = drawn["decode, prompts of 128 tokens"]
    assert by_batch.axis == "sequences at once"
    found = {(point["run"], point["across"]): point["speed"] for point in by_batch.points}
    assert found == {
        ("none1x128", 1): 50.0,  # one token in 20 ms
        ("none8x128", 8): 200.0,
        ("rtn1x128", 1): 100.0,
        ("rtn8x128", 8): 320.0,
    }
    prefill = {point["run"]: point["speed"] for point in drawn["prefill, prompts of 128 tokens"].points}
    assert prefill["rtn8x128"] == 1280.0  # 8 x 128 tokens in 800 ms
    by_prompt = drawn["decode, a batch of 1"].points
    assert [(point["across"], point["speed"]) for point in by_prompt] == [(128, 100.0), (512, 80.0)]
    assert len({point["line"] for point in by_batch.points}) == 2


def test_lines_are_told_apart_by_what_quantized_runs_differ_in() -> None:
    sweep = [timed(method, batch, 128, 10.0) for method in ("none", "rtn", "gptq") for batch in (1, 8)]
    for run in sweep:
        run.execution = replace(run.execution, mode="float" if run.run_id.startswith("none") else "packed")
    shared = {point["line"] for curve in curves.curves(to_frame(sweep)) for point in curve.points}
    assert not [line for line in shared if line.endswith((" float", " packed"))]
    for run in sweep[-2:]:
        run.execution = replace(run.execution, mode="simulated")
    told = {point["line"] for curve in curves.curves(to_frame(sweep)) for point in curve.points}
    assert sorted(line.rpartition(" ")[2] for line in told - shared) == ["packed", "simulated"]


def test_runs_of_one_batch_have_no_curves() -> None:
    assert not list(curves.curves(to_frame([timed("none", 1, 128, 20.0), timed("rtn", 1, 128, 10.0)])))
    assert not list(curves.curves(to_frame(records())))


def test_curves_are_in_the_page_after_the_plots(tmp_path: Path) -> None:
    sweep = [timed("none", 1, 128, 20.0), timed("none", 8, 128, 40.0)]
    loads = Loads(page.html(sweep, tmp_path))
    charted = json.loads(loads.data)["charts"]
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page.html(sweep, tmp_path))
    assert titles[-2:] == ["decode, prompts of 128 tokens", "prefill, prompts of 128 tokens"]
    assert len(charted) == len(titles)
    assert charted[-2]["layer"][0]["encoding"]["y"]["title"] == "tokens per second"


class Loads(HTMLParser):
    """What a page asks for, the elements in it, and its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.data = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.asked += [value for key in ("src", "href", "srcset", "data") if (value := given.get(key))]
        if tag == "script":
            self.scripts.append(given)
        self._inside = given.get("id") or ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "sweeps").mkdir()
    (folder / "sweeps" / "night.json").write_text(json.dumps(NIGHT))
    (folder / "sweeps" / "broken.json").write_text("[")
    return page.html(analysed(), folder)


def test_the_page_fetches_nothing(text: str) -> None:
    assert all(address.startswith(("#", "data:")) for address in Loads(text).asked)
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "dt-ordering-asc" in style
    assert "@import" not in style
    assert "url(" not in style
    assert "default-src 'none'" in text


def test_hostile_texts_stay_texts(text: str) -> None:
    parsed = Loads(text)
    assert len(parsed.scripts) == 4
    assert HOSTILE not in text
    assert text.count("&lt;/script&gt;&lt;script&gt;document.title = &#39;owned&#39;") >= 4
    assert json.loads(parsed.data)


def test_chart_data_hold_every_finished_run(text: str) -> None:
    data = json.loads(Loads(text).data)
    assert len(data["charts"]) == 6  # two losses by bits, size and latency; nothing is resident
    for spec in data["charts"]:
        runs = {row["run"] for row in _values(spec) if "run" in row}
        assert runs == {"base", "r0", "r1", "r2", "r3", "far"}
    assert {run["run"] for run in data["layers"]["runs"]} == {"base", "r0", "r1", "r2", "r3", "far"}
    assert data["layers"]["linears"][0][3] == ["model.layers.1.mlp.down_proj", 1, "mlp.down_proj"]


def _values(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for rows in spec.get("datasets", {}).values() for row in rows] or [
        row for part in [spec, *spec["layer"]] for row in part.get("data", {}).get("values", [])
    ]


def test_failures_conditions_sweeps_and_all_details_are_named(text: str) -> None:
    failed = text.partition('<section id="failed">')[2]
    assert 'data-run="bad"' in failed
    assert "&lt;/script&gt;" in failed.partition("</section>")[0]
    assert "they differ in packages.torch, cpu." in text
    assert "3.4 %" in text
    assert "broken" not in text
    for run in ("base", "r0", "far", "bad"):
        assert f'<template data-run="{run}">' in text
    beyond = re.search(r"Triangles at an edge lie beyond the plot: ([^<]*)", text)
    assert beyond is not None
    assert f"rtn group64 2 bits far: perplexity 100,000 (10,000{pareto.TIMES} float)" in beyond[1]


def test_the_front_is_what_no_other_point_beats() -> None:
    points = [(1.0, 9.0), (2.0, 9.0), (2.0, 5.0), (3.0, 6.0), (4.0, 1.0), (4.0, 1.0), (0.5, 9.5)]
    assert pareto.front(points) == [True, False, True, False, True, True, True]


def test_a_run_beyond_the_plot_stays_on_it() -> None:
    frame = page._frame(records())
    _, part = next(pareto.groups(frame))
    plot = pareto.plot(part, pareto.COSTS[0], pareto.LOSSES[0], pareto.labels(frame))
    at = {point["run"]: point for point in plot.points}
    assert at["far"]["loss"] == 100000.0
    assert at["far"]["height"] == pareto.REACH * 10.0
    assert at["far"]["shape"] == "triangle-up"
    assert len(plot.beyond) == 1
    spec = json.dumps(charts.pareto(plot, charts.palette(METHODS), wide=True))
    assert "http" not in spec


def test_float_models_far_beyond_the_axis_are_lines_with_their_names_and_no_points() -> None:
    frame = page._frame([*records(), full("half", 10.1, 16.0, method="none", dtype="bfloat16")])
    _, part = next(pareto.groups(frame))
    names = pareto.labels(frame)
    plot = pareto.plot(part, pareto.COSTS[0], pareto.LOSSES[0], names)
    assert {point["run"] for point in plot.floats} == {"base", "half"}
    assert max(point["across"] for point in plot.points) == 6.0
    spec = charts.pareto(plot, charts.palette(METHODS), wide=True)
    assert max(spec["layer"][-1]["encoding"]["x"]["scale"]["domain"]) < 7
    rules = [part for part in spec["layer"] if part["mark"]["type"] == "rule" and "x" not in part["encoding"]]
    assert len(rules) == 1
    assert any(row.get("text") == "float32, bfloat16" for row in _values(spec))
    times = next(cost for cost in pareto.COSTS if cost.name == "decode_ms_p50")
    assert pareto.plot(part, times, pareto.LOSSES[0], names).floats == []
    text = page.html([*records()], Path())
    assert "Dashed lines are float models that cost more than the axis shows: float baseline float32: " in text


def test_names_of_points_cover_no_point_no_other_name_and_no_axis() -> None:
    domains = ((1.0, 10.0), (1.0, 10.0))
    points = [
        {"across": 1.05, "height": 5.0, "front": True, "short": "at the left axis"},
        {"across": 5.0, "height": 5.0, "front": True, "short": "free"},
        {"across": 5.1, "height": 4.9, "front": True, "short": "beside it"},
        {"across": 8.0, "height": 1.01, "front": True, "short": "at the bottom"},
    ]
    assert names.free(points, domains, (700, 400), 12, []) == [1]
    assert names.free([points[1] | {"front": False}], domains, (700, 400), 12, []) == []
    assert names.free(points, domains, (700, 400), 12, [(300.0, 200.0, 600.0, 400.0)]) == []


def test_the_title_says_what_is_compared(tmp_path: Path) -> None:
    head = page.html(records(), tmp_path).partition("</header>")[0]
    assert "<title>ptqbench: 7 runs of m on d</title>" in head
    assert "<h1>7 runs of m on d</h1>" in head
    assert f"from {tmp_path}" in head


def test_perplexity_follows_the_columns_that_name_a_run() -> None:
    columns, _ = rows.table(page._frame(records()))
    assert [column.heading for column in columns][:4] == ["method", "scheme", "bits", "perplexity"]


def test_intervals_are_drawn_where_the_frame_has_them() -> None:
    frame = page._frame(records())
    frame["perplexity_low"], frame["perplexity_high"] = frame["perplexity"] * 0.9, frame["perplexity"] * 1.1
    _, part = next(pareto.groups(frame))
    plot = pareto.plot(part, pareto.COSTS[3], pareto.LOSSES[0], pareto.labels(frame))
    at = {point["run"]: point for point in plot.points}["r0"]
    assert (at["loss_low"], at["loss_high"]) == pytest.approx((10.5 * 0.9, 10.5 * 1.1))
    assert (at["cost_low"], at["cost_high"]) == (4.0, 8.0)
    fields = json.dumps(charts.pareto(plot, charts.palette(METHODS), wide=True))
    assert '"loss_low"' in fields
    assert '"cost_high"' in fields


def test_stale_runs_are_marked_in_the_table_and_in_their_names(tmp_path: Path) -> None:
    text = page.html(records(), tmp_path, stale={"r1"})
    (row,) = re.findall(r'<tr data-run="r1".*?</tr>', text, re.DOTALL)
    assert f'data-search="gptq {STALE}">gptq {STALE}</td>' in row
    assert text.count(f"{STALE}</td>") == 1
    assert f"<h2>gptq group64 4 bits {STALE}</h2>" in text
    assert STALE_NOTE.replace("'", "&#39;") in text
    assert STALE not in page.html(records(), tmp_path).partition("<script")[0]


def test_only_rows_of_one_text_are_compared() -> None:
    mixed = [*records(), full("o1", 3.0, 4.0, tokens="other"), full("o2", 4.0, 5.0, tokens="other")]
    sizes = [len(part) for _, part in pareto.groups(page._frame(mixed))]
    assert sizes == [6, 2]


def test_labels_tell_every_run_apart() -> None:
    same = [
        make("one", 1.0),
        make("two", 1.0, dtype="bfloat16"),
        make("three", 1.0, dtype="bfloat16"),
        make("x", 2, "none"),
    ]
    found = pareto.labels(to_frame(same))
    assert found["one"] == "rtn group64 4 bits float32"
    assert found["two"] == "rtn group64 4 bits bfloat16 two"
    assert found["x"] == "float baseline float32"


def test_quantized_caches_are_told_from_the_float_model_and_have_a_plot_of_their_own() -> None:
    found = [full("base", 10.0, 32.0, method="none"), full("coded", 11.0, 32.0, method="none")]
    for each, slope in zip(found, (4096.0, 1024.0), strict=True):
        each.metrics["kv_bytes_per_token"] = slope
    found[1].execution = replace(found[1].execution, kv="kivi2 residual=128")
    frame = page._frame(found)
    names = pareto.labels(frame)
    assert names == {"base": "float baseline float32", "coded": "float float32 kivi2 residual=128"}
    _, part = next(pareto.groups(frame))
    plots = {plot.cost.name: plot for plot in pareto.plots(part, names) if plot.loss.name == "perplexity"}
    assert {point["short"] for point in plots["kv_bytes_per_token"].points} == {"float32", "kivi2"}
    found[1].execution = replace(found[1].execution, kv=None)
    _, same = next(pareto.groups(page._frame(found)))
    assert "kv_bytes_per_token" not in {plot.cost.name for plot in pareto.plots(same, names)}
    assert ("KV", "bytes / token") not in headings(same)
    assert {("kv", ""), ("KV", "bytes / token")} <= headings(frame)


def headings(frame: pd.DataFrame) -> set[tuple[str, str]]:
    return {(column.heading, column.unit) for column in rows.table(frame)[0]}


def test_cells_round_but_sort_exactly() -> None:
    columns, table = rows.table(page._frame(records()))
    place = [column.heading for column in columns].index("perplexity")
    cells = {row.run_id: row.cells[place] for row in table}
    assert (cells["r0"].text, cells["r0"].below, cells["r0"].order) == ("10.50", f"1.05{pareto.TIMES}", 10.5)
    assert cells["far"].text == "1e+05"
    assert cells["bad"].order is None


def test_environments_are_classed_by_what_differs() -> None:
    found = details.classes(records(), "environment")
    assert found.keys == ["packages.torch", "cpu"]  # the failed run has none
    assert [count for _, count, _ in found.rows] == [5, 1, 1]
    assert found.of["r1"] == 2
    assert found.common == []


def test_runs_whose_sensitivity_was_measured_are_the_first_of_the_layers() -> None:
    found = records()[1:4]
    for each in found[:2]:
        for row in each.layers:
            del row["kl_alone"]
    runs = layers.sensitivity(found, {each.run_id: each.run_id for each in found})["runs"]
    assert [run["run"] for run in runs] == ["r2", "r0", "r1"]
    assert next(iter(runs[0]["figures"])) == "kl_alone"


def test_channels_keep_the_largest_of_many() -> None:
    before = [float(channel) for channel in range(1000)]
    kept = layers.channels({"before": before, "after": [0.5] * 1000})
    assert kept is not None
    assert kept["channel"][:3] == [999, 998, 997]
    assert kept["before"][: layers.LARGEST] == before[: -layers.LARGEST - 1 : -1]
    assert len(kept["rank"]) == layers.DRAWN
    assert kept["rank"] == sorted(set(kept["rank"]))
    assert layers.channels({"before": [float("nan")]}) is None


@pytest.mark.parametrize(("low", "high"), [(2.0, 8.3), (10.2, 36.0), (130.0, 520.0), (0.001, 90.0), (11.0, 11.6)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 0 < len(found) <= 9 or (low, high) == (11.0, 11.6)
    assert all(low <= value <= high for value in found)


def test_odd_failed_records_are_shown(tmp_path: Path) -> None:
    odd = Record(run_id='a"b<', status="failed", error=None, config={"method": {"rtn": None}, "scheme": 3})
    text = page.html([odd], tmp_path)
    assert 'data-run="a&#34;b&lt;"' in text
    assert "no reason was recorded" in text


def test_command_line_writes_page_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.cli.report.stale_ids", lambda _: {"r0"})
    for found in records():
        write(found, tmp_path)
    picture = tmp_path / "plot.png"
    assert main([f"runs={tmp_path}", f"png={picture}"]) == 0
    assert capsys.readouterr().out == f"{picture}\n{tmp_path / 'report.html'}\n"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(picture.read_bytes()[16:20], "big") == 2 * page.PIXELS
    assert (tmp_path / "report.html").read_text() == page.html(records(), tmp_path, {"r0"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=x"], "error: run=x is unknown; did you mean runs? expected one of: runs, table, output, png\n"),
        (["runs=/nowhere"], "error: runs=/nowhere is no folder; expected one with records"),
    ],
)
def test_command_line_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith(message)


def test_a_report_of_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.cli.report.stale_ids", lambda _: set())
    for found in records():
        write(found, tmp_path / "runs")
    (tmp_path / "tables.yaml").write_text("some: {runs: [base, r0]}")
    assert main([f"runs={tmp_path}", "table=some"]) == 0
    text = (tmp_path / "report.html").read_text()
    assert re.findall(r'<tr data-run="(\w+)"', text) == ["base", "r0"]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("harness.cli.report.find_spec", lambda name: None if name == "itables" else sys)
    assert main(["runs=results/reference"]) == 1
    assert capsys.readouterr().err == (
        "error: the report needs itables, not installed here; run pip install ptqbench[report]\n"
    )
