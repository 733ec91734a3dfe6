"""The page: records in, one self-contained HTML text out; and the plot of a README."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import itables
import pandas as pd
import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.records import Record
from harness.records.folder import runs_of
from harness.reports.cells import STALE_NOTE, number
from harness.reports.frame import to_frame
from harness.reports.html import charts, details, layers, pareto, rows
from harness.reports.html.curves import curves
from harness.reports.names import told_apart

TEMPLATES = Path(__file__).parent / "templates"
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
PIXELS = 1000  # width of the PNG, at twice the density


def html(records: Sequence[Record], folder: Path, stale: Set[str] = frozenset()) -> str:
    """The page of all records, with the sweeps of `folder`; runs with an id in `stale` are marked."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(_context(_ordered(records), folder, stale)) + "\n"


def png(records: Sequence[Record]) -> bytes:
    """Perplexity against bits per weight of the largest group of runs.

    Raises: ValueError if fewer than two runs have both figures.
    """
    frame = _frame(records)
    for title, part in pareto.groups(frame):
        plot = pareto.plot(part, pareto.COSTS[0], pareto.LOSSES[0], pareto.labels(frame))
        if len(plot.points) > 1:
            spec = charts.pareto(plot, charts.palette(list(part["method"])), wide=True, legend=True, font=14)
            spec |= {"width": PIXELS, "height": 560, "autosize": {"type": "fit", "contains": "padding"}, "padding": 16}
            spec |= {"title": _title(title, plot)}
            return vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=2)
    raise ValueError(
        "png= needs two finished runs with a perplexity; run `make bench`, or name another folder by runs="
    )


def _title(title: str, plot: pareto.Plot) -> dict[str, Any]:
    beyond = f"At the edge, beyond the plot: {'; '.join(pareto.named(plot.beyond))}" if plot.beyond else ""
    floats = pareto.named([(point["label"], pareto.cost_of(plot, point)) for point in plot.floats])
    beyond = ". ".join(filter(None, [f"Dashed: {'; '.join(floats)}" if floats else "", beyond]))
    look = {
        "anchor": "start",
        "color": charts.INK,
        "fontSize": 17,
        "subtitleFontSize": 13,
        "subtitleColor": charts.MUTED,
        "offset": 14,
    }
    text = f"{plot.loss.title} against {plot.cost.title}: {title}"
    return {"text": text, "subtitle": textwrap.wrap(beyond, 140)} | look


def _ordered(records: Sequence[Record]) -> list[Record]:
    """One record for each run, in the order of the table."""
    by_id = {record.run_id: record for record in told_apart(records)}
    return [by_id[run_id] for run_id in to_frame(records)["run_id"]]


def _context(records: list[Record], folder: Path, stale: Set[str]) -> dict[str, Any]:
    frame = _frame(records, stale)
    labels, colors = pareto.labels(frame), charts.palette(list(frame["method"]))
    groups = [_group(title, part, labels, colors) for title, part in pareto.groups(frame)]
    groups = [group for group in groups if group["losses"] or group["curves"]]
    sensitivity, outliers = layers.sensitivity(records, labels), layers.outliers(records, labels)
    columns, table = rows.table(frame)
    data = {
        "charts": [plot.pop("spec") for group in groups for plot in _plots(group)],
        "layers": sensitivity | {"spec": charts.layers()},
        "outliers": {"runs": outliers, "spec": charts.outliers()},
    }
    return _libraries() | {
        "title": _heading(frame),
        "summary": f"{_summary(frame)}, from {folder}",
        "groups": groups,
        "colors": colors,
        "columns": columns,
        "rows": table,
        "details": [details.details(record, labels[record.run_id]) for record in records],
        "failed": [(record.run_id, labels[record.run_id], record.error) for record in records if record.status != "ok"],
        "stale_note": STALE_NOTE if frame["stale"].any() else "",
        "has_layers": bool(sensitivity["runs"]),
        "has_outliers": bool(outliers),
        "environments": details.classes(records, "environment"),
        "protocols": details.classes(records, "data"),
        "sweeps": details.sweeps(runs_of(folder)),
        "data": as_json(data),
    }


def _frame(records: Sequence[Record], stale: Set[str] = frozenset()) -> pd.DataFrame:
    """The table's frame with the class of each run's protocol and environment."""
    frame = to_frame(records, stale=stale)
    for column, name in (("protocol_class", "data"), ("environment_class", "environment")):
        frame[column] = frame["run_id"].map(details.classes(records, name).of).astype(str)
    return frame


def _group(title: str, part: pd.DataFrame, labels: dict[str, str], colors: dict[str, str]) -> dict[str, Any]:
    plots = list(pareto.plots(part, labels))
    losses = [_loss([plot for plot in plots if plot.loss is loss], colors) for loss in pareto.LOSSES]
    methods = [method for method in colors if method in set(part["method"]) - {"none"}]
    return {
        "title": title,
        "losses": [loss for loss in losses if loss["plots"]],
        "curves": [{"title": curve.title, "spec": charts.speeds(curve)} for curve in curves(part)],
        "best": _best(part),
        "methods": methods,
    }


def _plots(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The plots of a group, in the order of the page."""
    return [*(plot for loss in group["losses"] for plot in loss["plots"]), *group["curves"]]


def _loss(plots: list[pareto.Plot], colors: dict[str, str]) -> dict[str, Any]:
    """The plots of one loss; runs beyond the edge of any of them are named once."""
    charted = []
    for plot in plots:
        wide = plot.cost is pareto.COSTS[0]
        title = f"{plot.loss.title.partition(',')[0]} against {plot.cost.title.partition(',')[0]}"
        charted.append({"title": title, "wide": wide, "spec": charts.pareto(plot, colors, wide=wide)})
    beyond = pareto.named([name for plot in plots for name in plot.beyond])
    return {
        "plots": charted,
        "beyond": beyond,
        "floats": pareto.named(
            [(point["label"], pareto.cost_of(plot, point)) for plot in plots for point in plot.floats]
        ),
        "zeros": list(dict.fromkeys(name for plot in plots for name in plot.zeros)),
    }


def _best(part: pd.DataFrame) -> list[dict[str, str]]:
    """Float, and the run with the lowest perplexity at each weight width, widest first."""
    scored = part.dropna(subset=["perplexity"]).sort_values("perplexity")
    scored = scored.assign(width=scored["bits"].where(scored["method"] != "none", float("inf")))
    best = scored.dropna(subset=["width"]).drop_duplicates("width").sort_values("width", ascending=False)
    return [
        {
            "run": row["run_id"],
            "width": "float" if row["method"] == "none" else f"best at {row['bits']:g} bits",
            "perplexity": number(row["perplexity"], ".2f"),
            "ratio": "" if pd.isna(row["perplexity_ratio"]) else f"{row['perplexity_ratio']:.2f}{pareto.TIMES}",
            "label": row["dtype"] if row["method"] == "none" else pareto.kind(row),
        }
        for _, row in best.iterrows()
    ]


def _heading(frame: pd.DataFrame) -> str:
    """What the page is about: the number of runs, and their model and text, or how many there are."""
    parts = [_count(len(frame), "run")]
    for word, name, plural in (("of", "model", "models"), ("on", "data", "texts")):
        values = list(frame[name].dropna().unique())
        if values:
            parts.append(f"{word} {' and '.join(map(str, values)) if len(values) < 3 else f'{len(values)} {plural}'}")
    return " ".join(parts)


def _summary(frame: pd.DataFrame) -> str:
    failed = int((frame["status"] != "ok").sum())
    parts = [f"{failed} failed"] if failed else []
    methods = frame.loc[frame["method"] != "none", "method"].nunique()
    shared = [frame[name].dropna().unique() for name in ("protocol", "device")]
    return ", ".join([*parts, _count(methods, "method"), *(str(values[0]) for values in shared if len(values) == 1)])


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


@cache
def _libraries() -> dict[str, Markup]:
    """Stylesheet and scripts, inlined; DataTables is the bundle that itables ships for use without a network."""
    bundle = Path(itables.__file__).parent / "html" / "dt_bundle.js"
    return {
        "style": Markup((TEMPLATES / "report.css").read_text()),
        "script": Markup((TEMPLATES / "report.js").read_text()),
        "vega": in_script(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)),
        "datatables": in_script(bundle.read_text(encoding="utf-8")),
    }


def in_script(source: str) -> Markup:
    """JavaScript in which nothing ends or hides the script element that contains it."""
    return Markup(re.sub(r"<(?=!--|/?script)", r"\\x3c", source, flags=re.IGNORECASE))


def as_json(value: Any) -> Markup:
    """JSON that is safe in a script element, whatever texts it contains."""
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
