"""Published figures: a table that is well formed, experiments that run all of it, and records judged by it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.cli import reproduce
from harness.config import build_run, changed_options
from harness.records import Record, write
from harness.reports import label, published
from harness.reports.published import Row
from harness.reports.tolerance import parse
from tests.conftest import ROOT, Done, resolve

Command = Callable[..., Done]
ROWS = published.read(ROOT / "results/published.csv")
PAPERS = sorted(path.stem for path in (ROOT / "conf/experiment").glob("paper_*.yaml"))
FLOAT_METHODS = ("none", "rtn")


def composed(experiment: str) -> Iterator[dict[str, Any]]:
    """Each run of an experiment: its configuration, swept as its sweeper does, the model's file put in by hand."""
    sweeps = yaml.safe_load((ROOT / f"conf/experiment/{experiment}.yaml").read_text())["hydra"]["sweeper"]["sweeps"]
    for line in sweeps:
        choices = {key: value.split(",") for key, _, value in (part.partition("=") for part in line.split())}
        models = choices.pop("model", [None])
        for values in itertools.product(*choices.values()):
            chosen = [f"{key}={value}" for key, value in zip(choices, values, strict=True)]
            raw = resolve(f"experiment={experiment}", *chosen)
            for model in models:  # composing anew for each would take minutes
                file = ROOT / f"conf/model/{model or raw['model']['name']}.yaml"
                yield raw | {"model": yaml.safe_load(file.read_text())}


def names(axis: str) -> set[str]:
    return {path.stem for path in (ROOT / f"conf/{axis}").glob("*.yaml")}


def test_every_row_names_what_there_is_and_where_it_is_from() -> None:
    steps = {"_".join(resolve(f"method={method}")["method"]) or "none" for method in names("method")}
    assert len(ROWS) > 250
    for row in ROWS:
        assert row.source, row
        assert row.model in names("model"), row
        assert row.method in steps, row
        assert row.metric == "perplexity"
        assert row.value > 1
        assert row.data in names("data")
        if row.method == "none":
            assert (row.scheme, row.bits, dict(row.options)) == ("", None, {}), row
        else:
            assert row.scheme in names("scheme"), row
            assert row.bits in (2, 3, 4, 8), row
        assert not (row.method in FLOAT_METHODS and row.tolerance.one_sided), f"{row}: lower is another protocol"
    assert {row.experiment for row in ROWS} == {*PAPERS, "authors"}
    assert any(not row.verified for row in ROWS)


def test_no_figure_is_there_twice() -> None:
    known = [(row.label, row.protocol, row.windows, row.value, row.source, row.experiment, row.note) for row in ROWS]
    assert len(set(known)) == len(known)


@pytest.mark.parametrize("experiment", PAPERS)
def test_an_experiment_runs_its_published_rows_and_no_others(experiment: str) -> None:
    rows = [row for row in ROWS if row.experiment == experiment]
    found = dict.fromkeys(range(len(rows)), 0)
    for raw in composed(experiment):
        cfg = build_run(raw)
        matched = [i for i, row in enumerate(rows) if published.matches(row, raw, changed_options(cfg))]
        assert matched, f"no row for {raw['model']['name']} {raw['method']} {raw['scheme']['name']} {raw['bits']}"
        assert cfg.execution == "simulated"
        assert not cfg.measure.latency
        for i in matched:
            found[i] += 1
    assert [rows[i].label for i, times in found.items() if times != 1] == []


def test_a_paper_without_the_hub_fails_in_a_line_that_names_it(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.utils.hub.reachable", lambda: False)
    done = command("experiment=paper_small", f"results_dir={tmp_path}", "isolate=false")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 3
    for line, model in zip(lines, ("gpt2", "pythia_410m", "pythia_1_4b"), strict=True):
        assert line.startswith(f"error: {model} none: model.id=")
        assert "(the hub cannot be reached and no copy is cached)" in line


# Comparing, on made-up rows and records.

ROW = Row(
    experiment="one",
    model="m",
    method="rtn",
    scheme="group64",
    bits=4,
    options={},
    data="wikitext2",
    protocol="gptq-2048",
    windows=None,
    metric="perplexity",
    value=10.0,
    tolerance=parse("+-1%"),
    source="a paper",
    verified=True,
    note="",
)


def a_record(perplexity: float = 10.05, run_id: str = "r", **changes: Any) -> Record:
    """A run of what ROW says, but for `changes` by dotted key, with __ for each dot."""
    weight = {"bits": 4, "grid": "full", "zero_point": "integer", "scale_dtype": "float16", "group_size": 64}
    config: dict[str, Any] = {
        "model": {"name": "m", "dtype": "auto"},
        "method": {"rtn": {"_target_": "x.Y", "clip": True}},
        "scheme": {"name": "group64", "weight": weight, "activation": None},
        "data": {"source": "wikitext2", "protocol": "gptq", "seq_len": 2048, "max_windows": None},
        "skip": [],
    }
    options = changes.pop("options", {})
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        inner = config
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return Record(run_id, config=config, options=options, metrics={"perplexity": perplexity})


def verdicts(row: Row, *records: Record) -> list[str]:
    return [figure.cells()[0] for figure in published.report([row], records).figures]


@pytest.mark.parametrize(
    ("perplexity", "tolerance", "expected"),
    [
        (10.05, "+-1%", "PASS"),
        (10.2, "+-1%", "FAIL"),
        (9.8, "+-1%", "FAIL"),
        (9.8, "+1%", "PASS (better)"),
        (9.95, "+1%", "PASS"),
        (10.2, "+1%", "FAIL"),
    ],
)
def test_judged_by_the_tolerance_of_the_row(perplexity: float, tolerance: str, expected: str) -> None:
    assert verdicts(replace(ROW, tolerance=parse(tolerance)), a_record(perplexity)) == [expected]


@pytest.mark.parametrize(
    "changes",
    [
        {"model__name": "n"},
        {"model__dtype": "bfloat16"},
        {"method": {"gptq": {}}},
        {"method": {}},
        {"scheme__name": "channel"},
        {"scheme__weight__bits": 3},
        {"scheme__weight__grid": "narrow"},
        {"scheme__weight__zero_point": "float"},
        {"scheme__weight__group_size": 32},
        {"data__source": "c4"},
        {"data__seq_len": 4096},
        {"data__max_windows": 20},
        {"skip": ["*.down_proj"]},
        {"options": {"rtn.clip": False}, "method__rtn__clip": False},
        {"options": {"engine.propagate": "float"}},
    ],
)
def test_another_setting_is_another_row(changes: dict[str, Any]) -> None:
    assert verdicts(ROW, a_record(**changes)) == []
    assert verdicts(ROW, a_record(**changes), a_record(run_id="s")) == ["PASS"]


def test_options_have_to_agree_where_a_row_names_them() -> None:
    row = replace(ROW, options={"method.rtn.clip": False, "scheme.weight.scale_dtype": "float32"})
    agreeing = {"options": {"rtn.clip": False}, "method__rtn__clip": False, "scheme__weight__scale_dtype": "float32"}
    assert verdicts(row, a_record(**agreeing)) == ["PASS"]
    assert verdicts(row, a_record(**agreeing | {"scheme__weight__scale_dtype": "float16"})) == []
    assert verdicts(row, a_record()) == []
    assert verdicts(ROW, a_record(scheme__weight__scale_dtype="float32")) == ["PASS"]


def test_missing_rows_are_shown_for_experiments_that_were_run_and_counted_for_others() -> None:
    rows = [
        ROW,
        replace(ROW, bits=3),
        replace(ROW, experiment="two", model="n"),
    ]
    found = published.report(rows, [a_record(), a_record(run_id="s", model__name="unknown")])
    assert [figure.cells()[:2] for figure in found.figures] == [
        ("PASS", label(a_record())),
        ("MISSING", "m rtn group64 bits=3"),
    ]
    assert "not run here: 1 figures of experiment=two" in found.notes
    assert "no published figure for: unknown rtn group64 bits=4" in found.notes
    assert found.summary() == "PASS: 1 PASS, 1 MISSING"
    assert published.report(rows, [a_record()], only="bits=4").summary() == "PASS: 1 PASS"
    assert published.report(rows, [a_record()], only="rtn*bits=3").summary() == "PASS: 1 PASS, 1 MISSING"


def test_the_embedded_model_meets_the_authors_programs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"published={ROOT}/results/published.csv", f"runs={ROOT}/results/reference"]
    assert reproduce.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("| PASS") >= 12
    assert "not run here: 25 figures of experiment=paper_gptq_opt" in out


def test_a_figure_off_its_target_fails_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (ROOT / "results/published.csv").read_text().splitlines()
    (tmp_path / "p.csv").write_text(
        "\n".join([lines[0], "one,m,rtn,group64,4,,wikitext2,gptq-2048,all,perplexity,9,+1%,s,no,"])
    )
    write(a_record(), tmp_path / "runs")
    code = reproduce.main([f"published={tmp_path}/p.csv", f"runs={tmp_path}/runs"])
    out = capsys.readouterr().out
    assert code == 1
    assert "| FAIL | m rtn group64 bits=4 | perplexity | 10.05 | 9 | +11.7 % | +1 % | s; from notes |" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("one,m,rtn,g,x,,d,gptq-8,all,perplexity,9,+1%,s,no,", "line 2: invalid literal for int"),
        ("one,m,rtn,g,4,,d,gptq-8,all,perplexity,9,1%,s,no,", "line 2: tolerance='1%' cannot be read"),
        ("one,m,rtn,g,4,,d,gptq-8,all,perplexity,9,+1%,s,maybe,", "line 2: 'maybe'"),
        ("one,m,rtn,g,4,,d,gptq-8,all,perplex,9,+1%,s,no,", "line 2: metric=perplex is unknown"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(",".join(published.COLUMNS) + "\n" + line)
    with pytest.raises(ValueError, match=message):
        published.read(path)
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="has other columns; expected: experiment, model"):
        published.read(path)
    with pytest.raises(ValueError, match="is no file; expected a table such as"):
        published.read(tmp_path / "none.csv")
