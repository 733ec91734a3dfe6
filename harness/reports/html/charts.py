"""Altair charts of the report, as Vega-Lite JSON; the page inlines one copy of Vega, and vl-convert draws the PNG.

Every chart has two parameters that the page sets: `shown`, the runs that pass the filters of the table, and `selected`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from harness.reports.html.curves import Curve
from harness.reports.html.names import WIDE, Domains, float_names, named_points
from harness.reports.html.pareto import Plot

Json = dict[str, Any]

HEIGHTS = {True: 400, False: 320}  # pixels of a wide plot and of the others

INK, MUTED, GRID = "#1b2430", "#5d6878", "#e6e9ee"
FONT = "-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
FLOAT = "datum.label == 'none' ? 'float' : datum.label"  # the legend's name of method none
COLORS = ("#2f6db3", "#d9622b", "#2a8f5c", "#b0387a", "#7a5bc0", "#b58a00", "#1697a6", "#c0392b", "#6b7f1e", "#8a5a3b",
          "#4b55c4", "#d0679d", "#5c6b7a", "#4f9d2f")  # fmt: skip


def palette(methods: Sequence[str]) -> dict[str, str]:
    """A colour for each method, the same in every chart; float is ink."""
    named = sorted({method for method in methods if method != "none"})
    return {"none": INK} | {method: COLORS[i % len(COLORS)] for i, method in enumerate(named)}


def pareto(plot: Plot, colors: dict[str, str], *, wide: bool, legend: bool = False, font: int = 12) -> Json:
    """Points with intervals, the front through those that no run beats, and the losses of float models as lines."""
    x, y = _domains(plot, 0.012 * font if wide else 0.24)
    points = named_points(plot, (x, y), HEIGHTS[wide], font)
    base = alt.Chart(alt.InlineData(values=points)).encode(
        x=alt.X("across:Q", **_scaled(plot.cost.title, x)), y=alt.Y("height:Q", **_scaled(plot.loss.title, y))
    )
    halo, names = _labels(base, font, stroke="white", strokeWidth=4), _labels(base, font, color=INK)
    marks = [
        *_floats(plot, font),
        *_intervals(base, plot),
        _front(base),
        halo,
        _points(base, plot, colors, legend),
        names,
    ]
    chart = alt.layer(*marks).add_params(alt.param(name="shown", value="all"), alt.param(name="selected", value=""))
    return finish(chart.properties(height=HEIGHTS[wide], width="container"), font)


def speeds(curve: Curve, font: int = 12) -> Json:
    """Tokens per second by batch or prompt, a line for each method and format."""
    names = sorted({str(point["line"]) for point in curve.points})
    places = sorted({int(point["across"]) for point in curve.points})
    color = alt.Color(
        "line:N",
        title=None,
        scale=alt.Scale(domain=names, range=[COLORS[i % len(COLORS)] for i in range(len(names))]),
        legend=alt.Legend(orient="top", symbolType="circle", columns=1, labelLimit=320),
    )
    base = alt.Chart(alt.InlineData(values=curve.points)).encode(
        x=alt.X(
            "across:Q",
            title=curve.axis,
            scale=alt.Scale(type="log", domain=[places[0], places[-1]], nice=False, padding=14),
            axis=alt.Axis(values=places, format="d", labelOverlap=True),
        ),
        y=alt.Y("speed:Q", title="tokens per second"),
        color=color,
        tooltip=[
            alt.Tooltip("line:N", title="run"),
            alt.Tooltip("across:Q", title=curve.axis),
            alt.Tooltip("speed:Q", title="tokens per second", format=".4~g"),
        ],
    )
    lines = base.mark_line(strokeWidth=1.6).encode(opacity=alt.value(0.7))
    points = base.mark_point(filled=True, size=70, cursor="pointer").encode(
        stroke=alt.condition("datum.run == selected", alt.value(INK), alt.value("white")),
        strokeWidth=alt.condition("datum.run == selected", alt.value(3), alt.value(1)),
        opacity=_opacity(1),
        description="line:N",
    )
    chart = alt.layer(lines, points).add_params(
        alt.param(name="shown", value="all"), alt.param(name="selected", value="")
    )
    return finish(chart.properties(height=HEIGHTS[False], width="container"), font)


def layers(font: int = 12) -> Json:
    """A heat map of linears by block, of rows {block, linear, value, name} that the page gives as `layers`."""
    chart = (
        alt.Chart(alt.NamedData(name="layers"))
        .mark_rect(stroke="white", strokeWidth=1)
        .encode(
            x=alt.X("block:O", title="block", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("linear:N", title=None, sort=None),
            color=alt.Color(
                "value:Q",
                title=None,
                scale=alt.Scale(scheme="yelloworangered", type="sqrt", zero=False, nice=False),
                legend=alt.Legend(orient="top", gradientLength=260, gradientThickness=10, format=".3~g"),
            ),
            tooltip=[alt.Tooltip("name:N", title="linear"), alt.Tooltip("value:Q", title="figure", format=".4~g")],
        )
        .properties(width="container", height={"step": 26})
    )
    return finish(chart, font)


def outliers(font: int = 12) -> Json:
    """The largest magnitude of each channel, of rows {rank, channel, stage, absmax} in the page's `channels`."""
    base = alt.Chart(alt.NamedData(name="channels")).encode(
        x=alt.X("rank:Q", title="channels, largest before smoothing first", scale=alt.Scale(nice=False)),
        y=alt.Y("absmax:Q", title="largest magnitude", scale=alt.Scale(type="log", nice=False, padding=12)),
        color=alt.Color(
            "stage:N",
            title=None,
            scale=alt.Scale(domain=["before", "after"], range=[COLORS[1], COLORS[0]]),
            legend=alt.Legend(orient="top", symbolType="circle"),
        ),
        tooltip=[alt.Tooltip(name) for name in ("stage:N", "channel:Q")] + [alt.Tooltip("absmax:Q", format=".4~g")],
    )
    points = base.mark_circle(size=22, opacity=0.85)
    return finish(points.properties(width="container", height=300), font)


def ticks(low: float, high: float) -> list[float]:
    """At most nine round values between two positive bounds, spaced by ratio."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 4, 6, 8), (1, 2, 3, 5), (1, 3), (1,)):
        values = [float(f"{step * 10.0**decade:g}") for decade in decades for step in steps]
        inside = [value for value in values if low <= value <= high]
        if len(inside) <= 9:
            break
    return inside


def finish(chart: alt.TopLevelMixin, font: int) -> Json:
    """The specification in the style of the report, without the address of its schema: nothing is fetched."""
    axis = {"labelColor": MUTED, "titleColor": INK, "gridColor": GRID, "domainColor": "#b9c1cc", "tickColor": "#b9c1cc"}
    sizes = {"labelFontSize": font, "titleFontSize": font + 1, "titleFontWeight": 600, "titlePadding": 10}
    spec: Json = chart.to_dict()
    spec.pop("$schema")
    spec["config"] = {
        "font": FONT,
        "background": "white",
        "view": {"stroke": None},
        "axis": axis | sizes,
        "legend": {"labelColor": INK, "titleColor": MUTED, "labelFontSize": font, "titleFontSize": font},
    }
    return spec


def _domains(plot: Plot, room: float) -> Domains:
    """Both axes of a plot; `room` for names on the left of points is a share of its width."""
    lows: list[float] = [_bound(point, "cost_low", "across") for point in plot.points]
    highs: list[float] = [_bound(point, "cost_high", "across") for point in plot.points]
    losses: list[float] = [point["height"] for point in plot.floats]
    bottoms: list[float] = [_bound(point, "loss_low", "height") for point in plot.points] + losses
    tops: list[float] = [_bound(point, "loss_high", "height") for point in plot.points] + losses
    return _stretched(min(lows), max(highs), (room, 0.03)), _stretched(min(bottoms), max(tops), (0.11, 0.04))


def _bound(point: Json, bound: str, middle: str) -> float:
    """The bound of a point's interval; its middle if it has none."""
    return float(point[bound] if bound in point else point[middle])


def _stretched(low: float, high: float, room: tuple[float, float]) -> tuple[float, float]:
    span = max(high / low, 1.05)
    return low / span ** room[0], high * span ** room[1]


def _scaled(title: str, domain: tuple[float, float]) -> Json:
    scale = alt.Scale(type="log", domain=list(domain), nice=False)
    axis = alt.Axis(values=ticks(*domain), format="~g", labelOverlap=True)
    return {"title": title, "scale": scale, "axis": axis}


def _floats(plot: Plot, font: int) -> list[alt.Chart]:
    """A dashed line at the loss of each float model that is no point, with its name at the left end, below the line.

    If all float models are points, only a line through the lowest.
    """
    points = [point for point in plot.points if point["method"] == "none"]
    lines = sorted(plot.floats, key=lambda point: float(point["loss"]))
    if not lines and not points:
        return []
    keys = ("run", "label", "height", "loss_text", "cost_text")
    rows = [{key: line[key] for key in keys} for line in lines]
    rows = rows or [{"height": min(point["height"] for point in points)}]
    base = alt.Chart(alt.InlineData(values=rows)).encode(y=alt.Y("height:Q"))
    look: Json = {"color": INK, "strokeDash": [2, 4]}
    if not lines:
        return [base.mark_rule(opacity=0.5, **look)]
    tooltip = [alt.Tooltip("label:N", title="run"), alt.Tooltip("loss_text:N", title=plot.loss.title.partition(",")[0])]
    tooltip.append(alt.Tooltip("cost_text:N", title=plot.cost.title.partition(",")[0]))
    rule = base.mark_rule(cursor="pointer", **look).encode(tooltip=tooltip, opacity=_opacity(0.7))
    lowest = alt.Chart(alt.InlineData(values=[{"height": rows[0]["height"], "text": float_names(plot)}]))
    name = lowest.mark_text(align="left", baseline="top", dy=4, dx=4, x=0, fontSize=font, color=MUTED)
    return [rule, name.encode(y=alt.Y("height:Q"), text="text:N")]


def _intervals(base: alt.Chart, plot: Plot) -> list[alt.Chart]:
    rules = []
    rule: Json = {"color": MUTED, "strokeWidth": 1.2}
    dim = {"opacity": _opacity(0.75)}
    if any("loss_low" in point for point in plot.points):
        rules.append(base.mark_rule(**rule).encode(y="loss_low:Q", y2="loss_high:Q", **dim))
    if any("cost_low" in point for point in plot.points):
        rules.append(base.mark_rule(**rule).encode(x="cost_low:Q", x2="cost_high:Q", **dim))
    return rules


def _front(base: alt.Chart) -> alt.Chart:
    line = base.transform_filter("datum.front").mark_line(interpolate="step-after", color=INK, strokeWidth=1.4)
    front: alt.Chart = line.encode(opacity=alt.value(0.55), order=alt.Order("across:Q"))
    return front


def _points(base: alt.Chart, plot: Plot, colors: dict[str, str], legend: bool) -> alt.Chart:
    """Hollow where simulated, a diamond for float, a triangle at the edge for a point beyond it."""
    colors = {method: color for method, color in colors.items() if any(at["method"] == method for at in plot.points)}
    key = alt.Legend(title="method", symbolType="circle", symbolStrokeWidth=0, labelExpr=FLOAT) if legend else None
    scale = alt.Scale(domain=list(colors), range=list(colors.values()))
    chosen = "datum.run == selected"
    marks = base.mark_point(filled=True, strokeWidth=2, cursor="pointer", shape=alt.expr("datum.shape"))
    points: alt.Chart = marks.encode(
        fill=alt.Fill("method:N", scale=scale, legend=key),
        stroke=alt.condition(chosen, alt.value(INK), alt.Stroke("method:N", scale=scale, legend=None)),
        strokeWidth=alt.condition(chosen, alt.value(4), alt.value(1.8)),
        fillOpacity=alt.condition("datum.simulated", alt.value(0.12), alt.value(0.85)),
        size=alt.condition(chosen, alt.value(190), alt.value(95)),
        opacity=_opacity(1),
        description="label:N",
        tooltip=[
            alt.Tooltip("label:N", title="run"),
            alt.Tooltip("loss_text:N", title=plot.loss.title.partition(",")[0]),
            alt.Tooltip("cost_text:N", title=plot.cost.title.partition(",")[0]),
            alt.Tooltip("run:N", title="run id"),
        ],
    )
    return points


def _labels(base: alt.Chart, font: int, **look: Any) -> alt.Chart:
    """Names of the runs on the front, below and left of their points, where no other run can be."""
    text = alt.expr(f"width >= {WIDE} ? datum.name : datum.narrow")
    marks = base.transform_filter("datum.name || datum.narrow").mark_text(
        align="right", baseline="top", dx=-6, dy=5, fontSize=font, text=text, **look
    )
    names: alt.Chart = marks.encode(opacity=_opacity(1))
    return names


def _opacity(full: float) -> Any:
    return alt.condition("shown == 'all' || indexof(shown, datum.run) >= 0", alt.value(full), alt.value(0.08))
