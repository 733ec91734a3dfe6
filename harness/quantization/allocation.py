"""Bit allocation under a budget: the width of each unit for which the sum of the errors is smallest."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One width for a unit.

    bits    width of one code
    stored  all stored bits of the unit at this width
    cost    error of the unit at this width
    """

    bits: int
    stored: int
    cost: float


def allocate(curves: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, Choice]:
    """Choose one width for each unit from its curve, with at most `budget` stored bits in total.

    Each unit starts with the choice that stores the fewest bits. Steps along the lower convex hulls of the curves are
    taken in order of the cost that they save per bit, the largest first; a step that does not fit ends the steps of
    its unit. Before the first step that does not fit, no other allocation with as many bits costs less (Shoham and
    Gersho 1988, IEEE ASSP 36(9): a Lagrangian reaches exactly the points on the hull).
    Raises: ValueError if the choices with the fewest bits exceed the budget.
    """
    hulls = {name: hull(curve) for name, curve in curves.items()}
    chosen = {name: points[0] for name, points in hulls.items()}
    spent = sum(choice.stored for choice in chosen.values())
    if spent > budget:
        raise ValueError(f"budget={budget:g} is below the {spent} bits that the narrowest widths take; raise it")
    steps = [(_saving(points, 0), name, 0) for name, points in hulls.items() if len(points) > 1]
    heapq.heapify(steps)
    while steps:
        _, name, position = heapq.heappop(steps)
        points = hulls[name]
        added = points[position + 1].stored - points[position].stored
        if spent + added > budget:
            continue
        spent, chosen[name] = spent + added, points[position + 1]
        if position + 2 < len(points):
            heapq.heappush(steps, (_saving(points, position + 1), name, position + 1))
    return chosen


def hull(curve: Sequence[Choice]) -> list[Choice]:
    """The choices on the falling part of the lower convex hull of cost over stored bits, fewest stored bits first."""
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
    """Change of cost per stored bit: negative, because costs fall along a hull."""
    return (right.cost - left.cost) / (right.stored - left.stored)
