"""Widths under a budget: which unit gets how many bits, so that the errors add up to the least."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One width for a unit: `bits` of a code, `stored` bits in all, and what it costs."""

    bits: int
    stored: int
    cost: float


def allocate(curves: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, Choice]:
    """A choice for each unit, of those in its curve, with at most `budget` stored bits together.

    Everyone starts at the cheapest to store. Steps along the lower convex hull of each curve are taken by what they
    save for a bit, the largest first; a step that no longer fits ends its unit's. Before the first that does not fit,
    no other choice of as many bits costs less (Shoham and Gersho 1988, IEEE ASSP 36(9): the hull is what a Lagrangian
    reaches).
    Raises: ValueError if even the cheapest to store exceeds the budget.
    """
    hulls = {name: hull(curve) for name, curve in curves.items()}
    chosen = {name: points[0] for name, points in hulls.items()}
    spent = sum(choice.stored for choice in chosen.values())
    if spent > budget:
        raise ValueError(f"the narrowest widths take {spent} bits; expected a budget of at least that, not {budget:g}")
    steps = [(_saving(points, 0), name, 0) for name, points in hulls.items() if len(points) > 1]
    heapq.heapify(steps)
    while steps:
        _, name, position = heapq.heappop(steps)
        points = hulls[name]
        more = points[position + 1].stored - points[position].stored
        if spent + more > budget:
            continue
        spent, chosen[name] = spent + more, points[position + 1]
        if position + 2 < len(points):
            heapq.heappush(steps, (_saving(points, position + 1), name, position + 1))
    return chosen


def hull(curve: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of cost over stored bits, as far as it falls; cheapest to store first."""
    points: list[Choice] = []
    for choice in sorted(curve, key=lambda each: (each.stored, each.cost)):
        if points and choice.cost >= points[-1].cost:
            continue
        while len(points) > 1 and _slope(points[-2], points[-1]) >= _slope(points[-1], choice):
            points.pop()
        points.append(choice)
    return points


def _saving(points: Sequence[Choice], position: int) -> float:
    return _slope(points[position], points[position + 1])


def _slope(left: Choice, right: Choice) -> float:
    """Cost a bit: negative, as hulls fall."""
    return (right.cost - left.cost) / (right.stored - left.stored)
