"""Records to a pandas frame: one row a run, figures with their ratio to the float baseline, intervals and ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness.records import Record, Text, read
from harness.reports import ranking

METRICS = (
    "perplexity",
    "nll",
    "kl",
    "kl_median",
    "kl_p99",
    "top1_agreement",
    "top5_agreement",
    "bits_per_weight",
    "model_size_mib",
    "resident_mib",
    "peak_memory_mib",
    "prefill_ms_p50",
    "prefill_ms_p10",
    "prefill_ms_p90",
    "prefill_speedup",
    "decode_ms_p50",
    "decode_ms_p10",
    "decode_ms_p90",
    "decode_speedup",
    "kv_mib",
    "kv_bytes_per_token",
    "prefill_j",
    "decode_j_per_token",
    "baseline_prefill_j",
    "baseline_decode_j_per_token",
    "quantize_s",
    "quantize_peak_mib",
)
# Speedups are ratios already, measured in pairs.
_RATIOS = ("perplexity", "bits_per_weight", "model_size_mib", "resident_mib", "peak_memory_mib", "kv_mib")
_DTYPES = ("float64", "float32", "float16", "bfloat16")
_DESCRIBED = (
    "run_id",
    "status",
    "model",
    "method",
    "scheme",
    "bits",
    "options",
    "kv",
    "dtype",
    "baseline_dtype",
    "execution",
    "kernel",
    "device",
    "data",
    "protocol",
    "windows",
    "seq_len",
    "calibration",
    "seed",
    "fingerprint",
    "tokens_sha256",
    "commit",
)
_COLUMNS = [*_DESCRIBED, *METRICS, "error"]
# What sets runs of one model and text apart, in the order in which tables name it.
SETTING = ("method", "scheme", "bits", "options", "calibration", "kv", "dtype", "execution")


def load(folder: Path, key: str = "runs") -> list[Record]:
    """All records of a folder; a file that is none is named on stderr and left out.

    Raises: ValueError if there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{key}={folder} is no folder; expected one with records, such as results/reference")
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(read(path))
        except ValueError as error:
            sys.stderr.write(f"warning: {error}; left out\n")
    return records


def load_some(folder: Path) -> list[Record]:
    """As `load`, of a folder `runs` that is there to be shown. Raises: ValueError if it holds none."""
    records = load(folder)
    if not records:
        raise ValueError(f"runs={folder} holds no records; run `make bench`, or name another folder")
    return records


def has_coded_caches(frame: pd.DataFrame) -> bool:
    """Whether a row has a quantized KV cache; elsewhere all caches are the models' own, and their sizes say nothing."""
    return bool((frame["kv"] != "none").any())


def label(record: Record) -> str:
    """A run in a few words: model, method, format, options."""
    row = describe(record)
    parts = [row["model"], row["method"], row["scheme"], f"bits={row['bits']}" if row["bits"] else ""]
    parts += [row["options"], f"kv={row['kv']}" if row["kv"] != "none" else "", row["dtype"]]
    parts += ["simulated" if row["execution"] == "simulated" else ""]
    return " ".join(str(part) for part in parts if part)


def to_frame(records: Sequence[Record], others: Sequence[Record] = ()) -> pd.DataFrame:
    """One row for each of `records`, sorted; `others` may hold their float baselines and give no rows.

    `<metric>_ratio` is to the float baseline of the same model, text and device: the run of method none in the row's
    `baseline_dtype`; where it is absent, so is the ratio. Intervals and ranks are those of `ranking`.
    """
    known: dict[str, Record] = {}
    for record in (*records, *others):
        known.setdefault(record.run_id, record)
    frame = pd.DataFrame([_row(record) for record in known.values()], columns=_columns(known.values()))
    for name in frame.columns.difference([*_DESCRIBED, "error"]).union(["bits"]):  # a failed run may hold anything
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype("float64")
    bases = _baselines(frame)
    for name in _RATIOS:
        frame[f"{name}_ratio"] = frame[name].to_numpy() / bases[name].to_numpy()
    base_ids = dict(zip(frame["run_id"], bases["run_id"], strict=True))
    frame = frame[frame["run_id"].isin([record.run_id for record in records])]
    runs = [known[run] for run in frame["run_id"]]
    found = ranking.columns(runs, [known.get(base_ids[run.run_id]) for run in runs])
    frame = frame.assign(**{name: pd.Series(values, index=frame.index) for name, values in found.items()})
    return frame.loc[_order(frame)].reset_index(drop=True)


def describe(record: Record) -> dict[str, Any]:
    """What a run is, as far as its record says; nothing of what came out."""
    config, stream = record.config, record.data.evaluation or Text()
    steps = config.get("method") or {}
    scheme = config.get("scheme") if steps else None
    return {
        "run_id": record.run_id,
        "status": record.status,
        "model": record.model.name or at(config, "model", "name"),
        "method": "+".join(steps) if isinstance(steps, dict) and steps else "none",
        "scheme": at(scheme, "name"),
        "bits": None if "mixed.budget" in record.options else at(scheme, "weight", "bits"),
        "options": _options_of(config, record.options) if steps else "",
        "kv": record.execution.kv or str(at(config, "kv", "name") or "none"),
        "dtype": record.execution.dtype or _asked_dtype(config),
        "baseline_dtype": record.execution.baseline_dtype,
        "execution": record.execution.mode,
        "kernel": record.execution.kernel,
        "device": record.execution.device,
        "data": stream.source or _asked_text(config),
        "protocol": record.data.protocol,
        "windows": stream.num_windows,
        "seq_len": stream.seq_len,
        "calibration": _calibration(record),
        "seed": config.get("seed"),
        "fingerprint": record.model.fingerprint,
        "tokens_sha256": stream.tokens_sha256,
        "commit": record.environment.commit,
    }


def _asked_dtype(config: Any) -> str | None:
    """The float type of a run that failed before its model was there, where it was named."""
    asked = at(config, "model", "dtype")
    return asked if asked in _DTYPES else None


def _asked_text(config: Any) -> str | None:
    """The evaluation text of a run that failed before it was read."""
    source, path = at(config, "data", "source"), at(config, "data", "path")
    return Path(str(path)).name if path else source and f"{source}:evaluation"


def _calibration(record: Record) -> str | None:
    """What chose the codes, as "8 x 512 tokens of pydocs:calibration, random"; None where nothing was read."""
    text = record.data.calibration
    if text is None:
        return None
    drawn = ", random" if text.sampling == "random" else ""
    return f"{text.num_windows} x {text.seq_len} tokens of {text.source}{drawn}"


def _row(record: Record) -> dict[str, Any]:
    return {**record.metrics, **describe(record), "error": record.error}


def _columns(records: Iterable[Record]) -> list[str]:
    """The usual columns, and, where runs were averaged over seeds, those of that."""
    found = {name for record in records for name in record.metrics}
    spread = [f"{name}_sd" for name in METRICS if f"{name}_sd" in found]
    return [*_COLUMNS, *spread, *(["seeds"] if "seeds" in found else [])]


def _baselines(frame: pd.DataFrame) -> pd.DataFrame:
    """Each row's float baseline, a row of NaN where there is none."""
    plain = (frame["method"] == "none") & (frame["kv"] == "none")
    floats = frame[plain & (frame["dtype"] == frame["baseline_dtype"])]
    keys = ["fingerprint", "tokens_sha256", "seq_len", "protocol", "device", "baseline_dtype"]
    return frame[keys].merge(floats.drop_duplicates(keys), on=keys, how="left")


def _order(frame: pd.DataFrame) -> pd.Index[Any]:
    order = frame.assign(
        floats=frame["method"] != "none",
        width=-frame["bits"].fillna(0),
        digits=frame["dtype"].map({name: i for i, name in enumerate(_DTYPES)}),
    )
    by = [
        "model",
        "data",
        "seq_len",
        "floats",
        "method",
        "scheme",
        "width",
        "options",
        "calibration",
        "kv",
        "digits",
        "seed",
        "run_id",
    ]
    return order.sort_values(by, kind="stable").index


def _options_of(config: dict[str, Any], options: dict[str, Any]) -> str:
    """What else tells rows apart: the options set anew, and fields of the scheme that its name does not say."""
    steps = config["method"]
    alone = isinstance(steps, dict) and len(steps) == 1  # then its name need not stand before each option
    short = {key.removeprefix(f"{next(iter(steps))}.") if alone else key: value for key, value in options.items()}
    found = [f"{key}={value}" for key, value in short.items()]
    weight = at(config, "scheme", "weight")
    own_grid = "narrow" if at(config, "scheme", "activation") else "full"  # of the schemes as they are shipped
    for key, usual in (("grid", own_grid), ("zero_point", "integer"), ("scale_dtype", "float16")):
        if isinstance(weight, dict) and weight.get(key, usual) != usual:
            found.append(f"{key}={weight[key]}")
    size = at(config, "scheme", "weight", "group_size")
    if size not in (None, -1) and str(size) not in str(at(config, "scheme", "name")):
        found.append(f"group_size={size}")
    return " ".join(found + ([f"skip={','.join(config['skip'])}"] if config.get("skip") else []))


def at(config: Any, *keys: str) -> Any:
    """A value of the configuration, None where there is none: a failed run's may have any shape."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config
