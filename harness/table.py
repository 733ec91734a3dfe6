"""Records to a pandas table: each figure with its ratio to the float baseline; as Markdown, CSV or Parquet.

    python -m harness.table [runs=FOLDER] [format=md|csv|parquet] [output=FILE] [into=README.md] [mark=table]

`into` replaces what stands between two marks of a Markdown file: <!-- table:begin --> and <!-- table:end -->, or those
of another name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from harness.record import Record, read

FORMATS = ("md", "csv", "parquet")
DEFAULTS = {"runs": "results/runs", "format": "md", "output": "", "into": "", "mark": "table"}

_METRICS = (
    "perplexity",
    "nll",
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
    "quantize_s",
    "quantize_peak_mib",
)
# Speedups are ratios already, measured in pairs.
_RATIOS = ("perplexity", "bits_per_weight", "model_size_mib", "resident_mib", "peak_memory_mib")
_DTYPES = ("float64", "float32", "float16", "bfloat16")

# Shown columns: heading, value, its ratio, digits of each.
_SHOWN = (
    ("perplexity", "perplexity", "perplexity_ratio", ".2f"),
    ("bits / weight", "bits_per_weight", "bits_per_weight_ratio", ".3f"),
    ("size MiB", "model_size_mib", "model_size_mib_ratio", ".1f"),
    ("resident MiB", "resident_mib", "resident_mib_ratio", ".1f"),
    ("peak MiB", "peak_memory_mib", "peak_memory_mib_ratio", ".0f"),
    ("prefill ms", "prefill_ms_p50", "prefill_speedup", ".0f"),
    ("decode ms", "decode_ms_p50", "decode_speedup", ".1f"),
    ("quant s", "quantize_s", None, ".1f"),
    ("quant MiB", "quantize_peak_mib", None, ".0f"),
)


def load(folder: Path) -> list[Record]:
    """All records of a folder; a file that is none is named on stderr and left out.

    Raises: ValueError if there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"runs={folder} is no folder; expected one with records, such as results/reference")
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(read(path))
        except ValueError as error:
            sys.stderr.write(f"warning: {error}; left out\n")
    return records


def label(record: Record) -> str:
    """A run in a few words: model, method, format."""
    row = _row(record)
    parts = [row["model"], row["method"], row["scheme"], f"bits={row['bits']}" if row["bits"] else "", row["dtype"]]
    return " ".join(str(part) for part in parts if part)


def to_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row a run, sorted, with `<metric>_ratio` to the float baseline of the same model, text and device.

    The baseline is the run of method none in the row's `baseline_dtype`; where it is absent, so is the ratio.
    """
    frame = pd.DataFrame([_row(record) for record in records], columns=_columns()).drop_duplicates("run_id")
    for name in (*_METRICS, "bits"):  # a failed run may hold anything
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype("float64")
    baselines = frame[(frame["method"] == "none") & (frame["dtype"] == frame["baseline_dtype"])]
    keys = ["fingerprint", "tokens_sha256", "seq_len", "device", "baseline_dtype"]
    matched = frame[keys].merge(baselines.drop_duplicates(keys), on=keys, how="left")
    for name in _RATIOS:
        frame[f"{name}_ratio"] = frame[name].to_numpy() / matched[name].to_numpy()
    order = frame.assign(
        floats=frame["method"] != "none",
        width=-frame["bits"].fillna(0),
        rank=frame["dtype"].map({name: i for i, name in enumerate(_DTYPES)}),
    )
    by = ["model", "data", "seq_len", "floats", "method", "scheme", "width", "options", "rank", "run_id"]
    return frame.loc[order.sort_values(by, kind="stable").index].reset_index(drop=True)


def display(frame: pd.DataFrame) -> pd.DataFrame:
    """The table as people read it: text cells, "value (ratio)", columns that say nothing left out."""
    out = pd.DataFrame(index=frame.index)
    for name in ("model", "data", "windows", "method", "scheme", "bits", "options", "dtype", "execution", "device"):
        if name in ("method", "scheme", "bits", "execution") or frame[name].nunique(dropna=False) > 1:
            out[name] = [_text(value) for value in frame[name]]
    kernels = zip(out["execution"], frame["kernel"], strict=True)
    out["execution"] = [mode if pd.isna(kernel) else f"{mode}: {kernel}" for mode, kernel in kernels]
    for heading, value, ratio, digits in _SHOWN:
        if frame[value].notna().any() or value == "perplexity":
            out[heading] = [_figure(row, value, ratio, digits) for _, row in frame.iterrows()]
    if (frame["status"] == "failed").any():
        out["status"] = frame["status"]
    return out


def to_markdown(frame: pd.DataFrame) -> str:
    """The shown table in Markdown, what all rows share above it and failures below it."""
    lines = [_shared(frame), "", display(frame).to_markdown(index=False, disable_numparse=True), ""]
    return "\n".join(lines + _failures(frame))


def show(frame: pd.DataFrame) -> None:
    """Print the table: drawn on a terminal, Markdown elsewhere."""
    console = Console()
    if not console.is_terminal:
        sys.stdout.write(to_markdown(frame) + "\n")
        return
    console.print(_shared(frame), markup=False, highlight=False)
    console.print(_drawn(display(frame)))
    for line in _failures(frame):
        console.print(line, markup=False)


def _drawn(shown: pd.DataFrame) -> Table:
    """The shown table for a terminal of 80 columns: what names a run in one cell, ratios below their figures."""
    figures = [heading for heading, *_ in _SHOWN if heading in shown]
    format_of = [name for name in ("method", "scheme", "bits") if name in shown]
    rest = [name for name in shown.columns if name not in (*format_of, *figures)]
    drawn = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    drawn.add_column("run", no_wrap=True)
    for heading in figures:
        drawn.add_column(heading.replace(" / ", "/\n").replace(" ", "\n"), justify="right", overflow="fold")
    for _, row in shown.iterrows():
        run = "\n".join(" ".join(str(row[name]) for name in names if row[name] != "-") for names in (format_of, rest))
        drawn.add_row(run, *(row[heading].replace(" (", "\n").rstrip(")") for heading in figures))
    return drawn


def between(text: str, mark: str = DEFAULTS["mark"]) -> tuple[str, str, str]:
    """What comes before the marked part of a Markdown text, the part, and what comes after, marks left outside it.

    Raises: ValueError if the text lacks the marks.
    """
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    if begin not in text or end not in text:
        raise ValueError(f"lacks the lines {begin} and {end}; add them where the table belongs")
    head, _, rest = text.partition(begin)
    part, _, tail = rest.partition(end)
    return head + begin, part, end + tail


def write_into(path: Path, markdown: str, mark: str = DEFAULTS["mark"]) -> None:
    """Replace the marked part of a Markdown file.

    Raises: ValueError if the file lacks the marks.
    """
    try:
        head, _, tail = between(path.read_text() if path.is_file() else "", mark)
    except ValueError as error:
        raise ValueError(f"into={path} {error}") from error
    path.write_text(f"{head}\n{markdown.strip()}\n{tail}")


def main(arguments: Sequence[str]) -> int:
    """The command line; 0, or 1 with one line on stderr."""
    try:
        options = _options(arguments)
        frame = to_frame(load(Path(options["runs"])))
        if frame.empty:
            raise ValueError(f"runs={options['runs']} holds no records; run `make bench`, or name another folder")
        _emit(frame, options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _emit(frame: pd.DataFrame, options: dict[str, str]) -> None:
    if options["into"]:
        write_into(Path(options["into"]), to_markdown(frame), options["mark"])
    elif options["format"] == "parquet":
        target = Path(options["output"] or Path(options["runs"]) / "table.parquet")
        frame.to_parquet(target, index=False)
        sys.stdout.write(f"{target}\n")
    elif options["output"]:
        text = frame.to_csv(index=False) if options["format"] == "csv" else to_markdown(frame)
        Path(options["output"]).write_text(text)
    elif options["format"] == "csv":
        sys.stdout.write(frame.to_csv(index=False))
    else:
        show(frame)


def _options(arguments: Sequence[str]) -> dict[str, str]:
    options = dict(DEFAULTS)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in options or not value:
            raise ValueError(f"{argument} is unknown; expected KEY=VALUE with a key of {', '.join(options)}")
        options[key] = value
    if options["format"] not in FORMATS:
        raise ValueError(f"format={options['format']} is unknown; expected one of: {', '.join(FORMATS)}")
    return options


def _columns() -> list[str]:
    described = ["run_id", "status", "model", "method", "scheme", "bits", "options", "dtype"]
    placed = [
        "baseline_dtype",
        "execution",
        "kernel",
        "device",
        "data",
        "protocol",
        "windows",
        "seq_len",
        "seed",
        "fingerprint",
        "tokens_sha256",
        "commit",
    ]
    return [*described, *placed, *_METRICS, "error"]


def _row(record: Record) -> dict[str, Any]:
    config, stream = record.config, record.data.get("evaluation", {})
    steps = config.get("method") or {}
    scheme = config.get("scheme") if steps else None
    row: dict[str, Any] = {name: record.metrics.get(name) for name in _METRICS}
    return row | {
        "run_id": record.run_id,
        "status": record.status,
        "error": record.error,
        "model": record.model.get("name") or _at(config, "model", "name"),
        "method": "+".join(steps) if isinstance(steps, dict) and steps else "none",
        "scheme": _at(scheme, "name"),
        "bits": _at(scheme, "weight", "bits"),
        "options": _options_of(config, record.options) if steps else "",
        "dtype": record.execution.get("dtype"),
        "baseline_dtype": record.execution.get("baseline_dtype"),
        "execution": record.execution.get("mode"),
        "kernel": record.execution.get("kernel"),
        "device": record.execution.get("device"),
        "data": stream.get("source") or _at(config, "data", "source"),
        "protocol": record.data.get("protocol"),
        "windows": stream.get("num_windows"),
        "seq_len": stream.get("seq_len"),
        "seed": config.get("seed"),
        "fingerprint": record.model.get("fingerprint"),
        "tokens_sha256": stream.get("tokens_sha256"),
        "commit": record.environment.get("commit"),
    }


def _options_of(config: dict[str, Any], options: dict[str, Any]) -> str:
    """What else tells rows apart: the options set anew, and fields of the scheme that its name does not say."""
    steps = config["method"]
    alone = isinstance(steps, dict) and len(steps) == 1  # then its name need not stand before each option
    short = {key.removeprefix(f"{next(iter(steps))}.") if alone else key: value for key, value in options.items()}
    found = [f"{key}={value}" for key, value in short.items()]
    weight = _at(config, "scheme", "weight")
    own_grid = "narrow" if _at(config, "scheme", "activation") else "full"  # of the schemes as they are shipped
    for key, usual in (("grid", own_grid), ("zero_point", "integer"), ("scale_dtype", "float16")):
        if isinstance(weight, dict) and weight.get(key, usual) != usual:
            found.append(f"{key}={weight[key]}")
    size = _at(config, "scheme", "weight", "group_size")
    if size not in (None, -1) and str(size) not in str(_at(config, "scheme", "name")):
        found.append(f"group_size={size}")
    return " ".join(found + ([f"skip={','.join(config['skip'])}"] if config.get("skip") else []))


def _at(config: Any, *keys: str) -> Any:
    """A value of the configuration, None where there is none: a failed run's may have any shape."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _shared(frame: pd.DataFrame) -> str:
    """What is the same in all rows, in one line."""
    parts = []
    for name in ("model", "data", "protocol", "windows", "dtype", "device"):
        values = frame[name].dropna().unique()
        if len(values) == 1:
            parts.append(f"{name} {_text(values[0])}")
    ratio = "with x: ratio to the float baseline (times: how many times as fast)"
    return f"{', '.join(parts)}; {ratio}" if parts else ratio


def _failures(frame: pd.DataFrame) -> list[str]:
    failed = frame[frame["status"] == "failed"]
    return [f"failed {row['run_id']}: {row['error']}" for _, row in failed.iterrows()]


def _figure(row: pd.Series[Any], value: str, ratio: str | None, digits: str) -> str:
    if pd.isna(row[value]):
        return "-"
    number = format(row[value], digits if row[value] < 1e4 else ".3g")
    if ratio is None or pd.isna(row[ratio]):
        return number
    return f"{number} ({row[ratio]:{'.2f' if row[ratio] < 1e3 else '.2g'}}x)"


def _text(value: Any) -> str:
    if value is None or pd.isna(value):
        return "-"
    return str(int(value)) if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
