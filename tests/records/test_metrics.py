"""The registry of metrics: names that runs record, and no second list of them anywhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from harness.records.metrics import LINEAR_METRICS, METRICS, headline, metric_of, repeats
from tests.conftest import ROOT

NAMES = {metric.name for metric in METRICS}
LINEAR_NAMES = {metric.name for metric in LINEAR_METRICS}


def test_no_metric_is_registered_twice() -> None:
    assert len(NAMES) + len(LINEAR_NAMES) == len(METRICS) + len(LINEAR_METRICS)
    assert not NAMES & LINEAR_NAMES
    headings = [metric.heading for metric in METRICS if metric.heading]
    assert len(set(headings)) == len(headings)


def test_a_ratio_is_a_recorded_speedup_or_the_column_that_frames_compute() -> None:
    for metric in METRICS:
        if metric.ratio is not None:
            assert metric.ratio in NAMES or metric.ratio == f"{metric.name}_ratio"


def test_what_plots_draw_is_better_when_lower_and_has_a_name() -> None:
    drawn = [metric for metric in METRICS if metric.axis]
    assert {metric.axis for metric in drawn} == {"cost", "loss"}
    assert all(metric.better == "lower" and metric.long for metric in drawn)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("perplexity", True),
        ("kl_p99", True),
        ("bits_per_weight", True),
        ("kv_mib", True),
        ("unheard_of", True),
        ("peak_memory_mib", False),
        ("quantize_peak_mib", False),
        ("quantize_s", False),
        ("decode_ms_p50", False),
        ("baseline_prefill_ms_p50", False),
        ("prefill_speedup", False),
        ("baseline_decode_j_per_token", False),
    ],
)
def test_results_and_counts_repeat_and_measurements_do_not(name: str, expected: bool) -> None:
    assert repeats(name) is expected


def test_look_ups() -> None:
    assert metric_of("decode_ms_p50").title == "decode"
    with pytest.raises(ValueError, match="metric=perplex is unknown; expected one of: perplexity, nll"):
        metric_of("perplex")
    assert headline(["decode_ms_p50", "nll"]) == "nll"
    assert headline(["made_up"]) is None


def lists_of_metrics(source: str) -> Iterator[int]:
    """Lines of the tuples, lists, sets and constant dictionaries that name three metrics or more."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            items: list[ast.expr | None] = [*node.elts]
        elif isinstance(node, ast.Dict) and all(isinstance(value, ast.Constant) for value in node.values):
            items = [*node.keys]
        else:
            continue
        words = {item.value for item in items if isinstance(item, ast.Constant)}
        if len(words & NAMES) > 2 or len(words & LINEAR_NAMES) > 2:
            yield node.lineno


def test_a_list_of_metrics_is_noticed() -> None:
    assert list(lists_of_metrics('x = ("perplexity", "kl", "nll")')) == [1]
    assert list(lists_of_metrics('x = {"kl_alone": "a", "weight_error": "b", "output_error": "c"}')) == [1]
    assert list(lists_of_metrics('x = {"perplexity": f(), "kl": g(), "nll": h()}')) == [], "a stage's results"


def test_no_other_list_of_metrics_in_the_harness() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / "harness").rglob("*.py"))
        if path.name != "metrics.py"
        for line in lists_of_metrics(path.read_text())
    ]
    assert found == [], "read harness.records.metrics instead"
