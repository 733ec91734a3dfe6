"""Tolerances: what they let pass, how they are written, and which figure gets which."""

from __future__ import annotations

import math
from typing import Any

import pytest

from harness.records import Record, Text, Texts
from harness.reports.tolerance import EXACT, Tolerance, of_metric, parse
from harness.reports.verdict import Figure, Report


def a_record(bits: int = 4, calibrated: bool = False, inputs: int | None = None, method: str = "rtn") -> Record:
    scheme: dict[str, Any] = {"weight": {"bits": bits}, "activation": None if inputs is None else {"bits": inputs}}
    steps = {} if method == "none" else {method: {}}
    data = Texts(evaluation=Text(), calibration=Text() if calibrated else None)
    return Record("r", config={"method": steps, "scheme": scheme}, data=data)


@pytest.mark.parametrize(
    ("written", "passes", "fails", "shown"),
    [
        ("+-0.02", [9.98, 10.02], [9.97, 10.03], "±0.02"),
        ("+-1%", [9.9, 10.1], [9.89, 10.11], "±1 %"),
        ("+1%", [1.0, 9.89, 10.1], [10.11], "+1 %"),
        ("+0.02", [1.0, 10.02], [10.03], "+0.02"),
    ],
)
def test_written_tolerances(written: str, passes: list[float], fails: list[float], shown: str) -> None:
    found = parse(written)
    assert str(found) == shown
    assert all(found.holds(value, 10.0) for value in passes)
    assert not any(found.holds(value, 10.0) for value in fails)


@pytest.mark.parametrize("written", ["", "2", "2%", "-2%", "+-", "+x%", "+-2%%", "nan"])
def test_what_is_no_tolerance(written: str) -> None:
    with pytest.raises(ValueError, match="cannot be read; expected such as"):
        parse(written)


def test_better_is_beyond_the_tolerance_and_only_where_welcome() -> None:
    assert parse("+1%").better(9.8, 10.0)
    assert not parse("+1%").better(9.95, 10.0)
    assert not parse("+-1%").better(9.8, 10.0)
    assert EXACT.holds(1.0, 1.0)
    assert not EXACT.holds(1.0 + 1e-12, 1.0)


@pytest.mark.parametrize(
    ("record", "share"),
    [
        (a_record(method="none"), 0.001),
        (a_record(8), 0.001),
        (a_record(8, calibrated=True, inputs=8), 0.001),
        (a_record(4), 0.002),
        (a_record(4, calibrated=True), 0.02),
        (a_record(3), 0.05),
        (a_record(3, calibrated=True), 0.05),
        (a_record(2), 0.2),
        (a_record(4, inputs=4), 0.2),
    ],
)
def test_perplexity_may_move_by_its_kind(record: Record, share: float) -> None:
    assert of_metric(record, "perplexity", same=False) == Tolerance(share)
    nll = of_metric(record, "nll", same=False)
    assert nll is not None
    for factor, holds in ((1 + 0.99 * share, True), (1 + 1.01 * share, False)):
        assert nll.holds(3 + math.log(factor), 3.0) is holds
    for metric in ("perplexity", "nll"):
        exact = of_metric(record, metric, same=True)
        assert exact is not None
        assert not exact.holds(2.0 + 1e-9, 2.0)


def test_other_figures() -> None:
    for name in ("bits_per_weight", "model_size_mib", "resident_mib", "kv_mib"):
        assert of_metric(a_record(), name, same=False) == EXACT
    assert of_metric(a_record(), "decode_ms_p50", same=True) is None
    assert of_metric(a_record(), "top1_agreement", same=True) == EXACT
    assert of_metric(a_record(), "top1_agreement", same=False) is None
    for same in (True, False):
        assert of_metric(a_record(), "peak_memory_mib", same) == Tolerance(0.5)


def test_a_report_counts_its_verdicts_and_shows_each_number() -> None:
    report = Report(
        "Title",
        ["a note"],
        [
            Figure("run one", "perplexity", 10.0, 10.0, parse("+-1%")),
            Figure("run one", "decode_ms_p50", 30.0, 10.0),
            Figure("run two", "perplexity", 8.0, 10.0, parse("+1%")),
            Figure("run three", "run", None, None, note="no text", word="SKIP"),
        ],
    )
    text = report.markdown()
    assert not report.failed
    assert report.summary() == "PASS: 2 PASS, 1 SKIP"
    assert "| PASS | run one | perplexity | 10 | 10 | none | ±1 % |" in text
    assert "| - | run one | decode_ms_p50 | 30 | 10 | 3.00x |" in text
    assert "| PASS (better) | run two | perplexity | 8 | 10 | -20 % | +1 % |" in text
    assert "| SKIP | run three | run | - | - |  |  | no text |" in text
    report.figures.append(Figure("run four", "perplexity", None, 10.0, parse("+1%")))
    assert report.failed
    assert report.summary() == "FAIL: 2 PASS, 1 FAIL, 1 SKIP"
    assert Report("t").summary() == "nothing was compared: no figures"
