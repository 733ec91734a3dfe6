"""The registry of metrics: how each is called, written, compared and judged. A new metric is one entry here.

`runs` asks which metrics repeat to the bit; `reports` makes every table, plot and comparison from these entries.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["exact", "result", "peak", "time", "energy"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of a run, or of one linear.

    name     its key in a record and its column in a frame
    kind     how it is judged. exact: counted from shapes, the same on every machine. result: repeats to the bit on the
             same machine and code. peak: a peak of memory, which also contains freed memory that the allocator keeps.
             time, energy: measured, and different in every run.
    better   which direction is better
    heading  heading of its column, the unit last; None for a metric that is in CSV and Parquet files only
    long     its name in plots and descriptions, without the unit
    unit     of its value; empty for numbers and shares
    digits   its format in tables
    ratio    the column with its ratio to the float baseline: a speedup for times
    short    what the short table shows of it: its value, its ratio, or both; None if it is not in that table
    axis     the axis of the Pareto plots that it is on
    usual    its usual value: it has no column in a table where every row has this value
    """

    name: str
    kind: Kind
    better: Literal["lower", "higher"] = "lower"
    heading: str | None = None
    long: str = ""
    unit: str = ""
    digits: str = ".4g"
    ratio: str | None = None
    short: Literal["value", "ratio", "both"] | None = None
    axis: Literal["cost", "loss"] | None = None
    usual: float | None = None

    @property
    def title(self) -> str:
        """The heading without the unit."""
        return (self.heading or self.name).removesuffix(f" {self.unit}")


METRICS = (
    Metric(
        name="perplexity",
        kind="result",
        heading="perplexity",
        long="perplexity",
        digits=".2f",
        ratio="perplexity_ratio",
        short="both",
        axis="loss",
    ),
    Metric(name="nll", kind="result", unit="nats", digits=".4f"),
    Metric(
        name="kl",
        kind="result",
        heading="KL",
        long="KL divergence from float",
        unit="nats",
        digits=".3g",
        short="value",
        axis="loss",
    ),
    Metric(name="kl_median", kind="result", unit="nats"),
    Metric(name="kl_p99", kind="result", unit="nats"),
    Metric(name="held_out_kl", kind="result", unit="nats"),  # on calibration data, after the model was trained
    Metric(name="held_out_kl_before", kind="result", unit="nats"),
    Metric(name="rotation_kl", kind="result", unit="nats"),  # the same, of rounded inputs, after a rotation was trained
    Metric(name="rotation_kl_before", kind="result", unit="nats"),
    Metric(name="top1_agreement", kind="result", better="higher", heading="top-1", digits=".1%", short="value"),
    Metric(name="top5_agreement", kind="result", better="higher", digits=".1%"),
    Metric(
        name="total_weight_error",
        kind="result",
        heading="weight error",
        long="relative error of all quantized weights",
        digits=".4f",
    ),
    Metric(
        name="bits_per_weight",
        kind="exact",
        heading="bits / weight",
        long="bits per weight",
        digits=".3f",
        ratio="bits_per_weight_ratio",
        short="value",
        axis="cost",
    ),
    Metric(
        name="quantized_share",
        kind="exact",
        better="higher",
        heading="quantized",
        long="share of the decoder's weights that is quantized",
        digits=".1%",
        short="value",
        usual=1.0,
    ),
    Metric(
        name="model_size_mib",
        kind="exact",
        heading="size MiB",
        long="model size",
        unit="MiB",
        digits=".1f",
        ratio="model_size_mib_ratio",
        short="value",
        axis="cost",
    ),
    Metric(
        name="resident_mib",
        kind="exact",
        heading="resident MiB",
        long="resident memory",
        unit="MiB",
        digits=".1f",
        ratio="resident_mib_ratio",
        axis="cost",
    ),
    Metric(
        name="peak_memory_mib",
        kind="peak",
        heading="peak MiB",
        unit="MiB",
        digits=".0f",
        ratio="peak_memory_mib_ratio",
        short="value",
    ),
    Metric(
        name="prefill_ms_p50",
        kind="time",
        heading="prefill ms",
        unit="ms",
        digits=".0f",
        ratio="prefill_speedup",
        short="ratio",
    ),
    Metric(name="prefill_ms_p10", kind="time", unit="ms"),
    Metric(name="prefill_ms_p90", kind="time", unit="ms"),
    Metric(name="baseline_prefill_ms_p50", kind="time", unit="ms"),
    Metric(name="prefill_speedup", kind="time", better="higher"),
    Metric(
        name="decode_ms_p50",
        kind="time",
        heading="decode ms",
        long="decode latency per token",
        unit="ms",
        digits=".1f",
        ratio="decode_speedup",
        short="ratio",
        axis="cost",
    ),
    Metric(name="decode_ms_p10", kind="time", unit="ms"),
    Metric(name="decode_ms_p90", kind="time", unit="ms"),
    Metric(name="baseline_decode_ms_p50", kind="time", unit="ms"),
    Metric(name="decode_speedup", kind="time", better="higher"),
    Metric(
        name="kv_mib", kind="exact", heading="KV MiB", unit="MiB", digits=".2f", ratio="kv_mib_ratio", short="value"
    ),
    Metric(
        name="kv_bytes_per_token",
        kind="exact",
        heading="KV bytes / token",
        long="KV cache",
        unit="bytes / token",
        digits=".0f",
        axis="cost",
    ),
    Metric(name="prefill_j", kind="energy", heading="prefill J", unit="J", digits=".2f"),
    Metric(name="decode_j_per_token", kind="energy", heading="decode J / token", unit="J / token", digits=".3f"),
    Metric(name="baseline_prefill_j", kind="energy", unit="J"),
    Metric(name="baseline_decode_j_per_token", kind="energy", unit="J / token"),
    Metric(name="quantize_s", kind="time", heading="quant s", unit="s", digits=".1f"),
    Metric(name="quantize_peak_mib", kind="peak", heading="quant MiB", unit="MiB", digits=".0f"),
)

# Of one linear, in the rows of a record's `layers`: errors of the output first, as reports show them.
LINEAR_METRICS = (
    Metric(name="kl_alone", kind="result", heading="KL alone", long="KL with only this linear quantized", digits=".3g"),
    Metric(
        name="kl_without",
        kind="result",
        heading="KL without",
        long="KL with every linear but this one quantized",
        digits=".3g",
    ),
    Metric(
        name="nll_alone", kind="result", heading="nll alone", long="nll with only this linear quantized", digits=".4f"
    ),
    Metric(name="nll_without", kind="result", long="nll with every linear but this one quantized"),
    Metric(
        name="output_error",
        kind="result",
        heading="output error",
        long="relative error of the output",
        digits=".4f",
    ),
    Metric(
        name="hessian_error",
        kind="result",
        heading="Hessian error",
        long="relative error, weighted by the Hessian",
        digits=".4f",
    ),
    Metric(
        name="weight_error",
        kind="result",
        heading="weight error",
        long="relative error of the weight",
        digits=".4f",
    ),
)

_BY_NAME = {metric.name: metric for metric in METRICS}


def metric_of(name: str) -> Metric:
    """The metric of a run by its name.

    Raises: ValueError if there is none.
    """
    if name not in _BY_NAME:
        raise ValueError(f"metric={name} is unknown; expected one of: {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def repeats(name: str) -> bool:
    """Whether a metric repeats to the bit on the same machine and code; an unknown one must, so that a change shows."""
    return name not in _BY_NAME or _BY_NAME[name].kind in ("exact", "result")


def headline(names: Iterable[str]) -> str | None:
    """The most telling of some metrics, the first in the order of the registry; None if none of them is registered."""
    present = set(names)
    return next((metric.name for metric in METRICS if metric.name in present), None)
