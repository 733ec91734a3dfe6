"""The frame as people read it: text cells, "value (ratio)", and what all rows share in one line."""

from __future__ import annotations

from typing import Any

import pandas as pd

from harness.reports.frame import SETTING, has_coded_caches

# Shown columns: heading, value, its ratio, digits of each.
SHOWN = (
    ("perplexity", "perplexity", "perplexity_ratio", ".2f"),
    ("KL", "kl", None, ".3g"),
    ("top-1", "top1_agreement", None, ".1%"),
    ("bits / weight", "bits_per_weight", "bits_per_weight_ratio", ".3f"),
    ("size MiB", "model_size_mib", "model_size_mib_ratio", ".1f"),
    ("resident MiB", "resident_mib", "resident_mib_ratio", ".1f"),
    ("peak MiB", "peak_memory_mib", "peak_memory_mib_ratio", ".0f"),
    ("prefill ms", "prefill_ms_p50", "prefill_speedup", ".0f"),
    ("decode ms", "decode_ms_p50", "decode_speedup", ".1f"),
    ("KV MiB", "kv_mib", "kv_mib_ratio", ".2f"),
    ("prefill J", "prefill_j", None, ".2f"),
    ("decode J", "decode_j_per_token", None, ".3f"),
    ("quant s", "quantize_s", None, ".1f"),
    ("quant MiB", "quantize_peak_mib", None, ".0f"),
)
RANK = "rank"
_NAMES = (
    "model",
    "data",
    "windows",
    *SETTING,
    "device",
    "seed",
)
_ALWAYS = ("method", "scheme", "bits", "execution")


def display(frame: pd.DataFrame) -> pd.DataFrame:
    """The table as people read it: text cells, "value (ratio)", columns that say nothing left out."""
    out = names(frame)
    if "seeds" in frame:
        out["seeds"] = [text(value) for value in frame["seeds"]]
    for heading, value, ratio, digits in SHOWN:
        if value == "perplexity" or (frame[value].notna().any() and _tells(frame, value)):
            out[heading] = [_figure(row, value, ratio, digits) for _, row in frame.iterrows()]
        if value == "perplexity" and frame["rank_low"].notna().any():
            out[RANK] = [_rank(row) for _, row in frame.iterrows()]
    if (frame["status"] == "failed").any():
        out["status"] = frame["status"]
    return out


def _tells(frame: pd.DataFrame, value: str) -> bool:
    """Whether a figure says something of these rows: the size of a cache does where one is quantized."""
    return value != "kv_mib" or has_coded_caches(frame)


def names(frame: pd.DataFrame) -> pd.DataFrame:
    """What tells the rows apart, as text: what is the same in all of them is left out."""
    out = pd.DataFrame(index=frame.index)
    for name in _NAMES:
        if name in _ALWAYS or frame[name].nunique() > 1:
            out[name] = [text(value) for value in frame[name]]
    kernels = zip(out["execution"], frame["kernel"], strict=True)
    out["execution"] = [mode if pd.isna(kernel) else f"{mode}: {kernel}" for mode, kernel in kernels]
    return out


def shared(frame: pd.DataFrame) -> str:
    """What is the same in all rows, and what the marks of the table mean, in one line."""
    marks = ["with x: ratio to the float baseline (times: how many times as fast)"]
    if any(_is_noise(row) for _, row in frame.iterrows()):
        marks.append("≈: its 95% interval over windows holds 1")
    if frame["rank_low"].notna().any():
        marks.append("rank: among rows on the same windows, 2-4 where their intervals leave 2 to 4 open")
    if "seeds" in frame:
        marks.append("±: standard deviation over seeds")
    return "; ".join([part for part in (in_common(frame),) if part] + marks)


def in_common(frame: pd.DataFrame) -> str:
    """The values that all rows have."""
    parts = []
    for name in ("model", "data", "protocol", "windows", "calibration", "dtype", "device"):
        values = frame[name].dropna().unique()
        if len(values) == 1:
            parts.append(f"{name} {text(values[0])}")
    return ", ".join(parts)


def failures(frame: pd.DataFrame) -> list[str]:
    """A line for each failed run."""
    failed = frame[frame["status"] == "failed"]
    return [f"failed {row['run_id']}: {row['error']}" for _, row in failed.iterrows()]


def text(value: Any) -> str:
    """A cell: whole numbers without a point, a dash for nothing."""
    if value is None or pd.isna(value):
        return "-"
    return str(int(value)) if isinstance(value, float) else str(value)


def number(value: float, digits: str) -> str:
    """A figure in `digits`, or three significant ones where that would be long."""
    return format(value, digits if value < 1e4 else ".3g")


def times(ratio: float) -> str:
    """A ratio with its x."""
    return f"{ratio:{'.2f' if ratio < 1e3 else '.2g'}}x"


def _figure(row: pd.Series[Any], value: str, ratio: str | None, digits: str) -> str:
    if pd.isna(row[value]):
        return "-"
    shown, spread = number(row[value], digits), row.get(f"{value}_sd", 0.0)
    if spread > 0:
        shown += f" ± {number(spread, digits)}"
    if ratio is None or pd.isna(row[ratio]):
        return shown
    return f"{shown} ({'≈' if value == 'perplexity' and _is_noise(row) else ''}{times(row[ratio])})"


def _is_noise(row: pd.Series[Any]) -> bool:
    """Whether the ratio to the float baseline may be 1; the very same windows are no noise."""
    low, high = row["perplexity_ratio_low"], row["perplexity_ratio_high"]
    return bool(low <= 1 <= high and low < high)


def _rank(row: pd.Series[Any]) -> str:
    low, high = row["rank_low"], row["rank_high"]
    if pd.isna(low):
        return "-"
    return f"{low:.0f}" if low == high else f"{low:.0f}-{high:.0f}"
