"""Which names stand next to the points of a plot: those that cover no axis, no point and no other name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from harness.reports.html.pareto import Plot

Json = dict[str, Any]
Domains = tuple[tuple[float, float], tuple[float, float]]  # of the cost and of the loss
Box = tuple[float, float, float, float]  # left, bottom, right, top

WIDE, NARROW = 700, 250  # pixels of width for which the names in a plot are placed: it has the former or more, or less


def named_points(plot: Plot, domains: Domains, height: int, font: int) -> list[Json]:
    """Points with the names that stand next to them in a wide plot, `name`, and in a narrow one, `narrow`."""
    named = [at | {"name": "", "narrow": ""} for at in plot.points]
    for key, width in (("name", WIDE), ("narrow", NARROW)):
        taken = []
        if plot.floats:
            top = min(_pixels(line, domains, (width, height))[1] for line in plot.floats)
            taken = [(0.0, top - 4 - 1.2 * font, 4 + 0.62 * font * len(float_names(plot)), top)]
        for i in free(plot.points, domains, (width, height), font, taken):
            named[i][key] = plot.points[i]["short"]
    return named


def free(points: Sequence[Json], domains: Domains, size: tuple[int, int], font: int, taken: Sequence[Box]) -> list[int]:
    """The points of the front whose name, left of and below the point, covers no axis, no other name and no point.

    `taken` are places of other texts, in pixels from the lower left corner.
    """
    pixels = [_pixels(point, domains, size) for point in points]
    boxes = list(taken)
    chosen = []
    for i in sorted((i for i, at in enumerate(points) if at["front"]), key=lambda i: pixels[i]):
        right, top = pixels[i][0] - 6, pixels[i][1] - 5
        box = (right - 0.62 * font * len(points[i]["short"]), top - 1.2 * font, right, top)
        inside = box[0] > 0 and box[1] > 0
        covers = any(_overlap(box, (x - 5, y - 5, x + 5, y + 5)) for x, y in pixels)
        if inside and not covers and not any(_overlap(box, other) for other in boxes):
            boxes.append(box)
            chosen.append(i)
    return chosen


def _pixels(point: Json, domains: Domains, size: tuple[int, int]) -> tuple[float, float]:
    """The place of a point in a plot of `size`, from its lower left corner."""
    shares = (
        math.log(value / low) / math.log(high / low)
        for value, (low, high) in zip((point["across"], point["height"]), domains, strict=True)
    )
    across, up = (share * length for share, length in zip(shares, size, strict=True))
    return across, up


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def float_names(plot: Plot) -> str:
    """The text at the lines of float models, the lowest first."""
    lines = sorted(plot.floats, key=lambda point: float(point["loss"]))
    return ", ".join(dict.fromkeys(str(line["short"]) for line in lines))
