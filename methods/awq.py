"""AWQ: scale input channels by how large their activations are, so that what matters is rounded more finely.

Paper: Lin et al. 2023, arXiv 2306.00978, equations 4 and 5: s = m^r with m_j = mean|x_j|, and r from a grid search on
    the output error of the module that the linears belong to; then ranges are clipped by the error of each group.
Differs: the clip search works on the Hessian's diagonal blocks, which hold all tokens where the authors' code
    (mit-han-lab/llm-awq auto_clip.py) takes 512, shrinks both ends of a range apart, and covers query and key too.
    Every proved producer absorbs a scale; `pairs=paper` leaves out the value projection under grouped queries,
    `pairs=norms` all but norms. The grid is searched from coarse to fine, with `exhaustive` as theirs, on
    `engine.search_tokens` tokens; for a linear alone in its group on all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from harness.core.clip import clipped_params
from harness.core.method import InputGroup, Method
from harness.core.qtensor import QTensor, round_to_grid, round_to_nearest
from harness.core.ranges import at_least
from harness.core.scheme import Scheme
from harness.core.stats import AbsMean, Hessian, Stats

_TINY = 1e-4  # the authors' floor


@dataclass(frozen=True, kw_only=True)
class AWQ(Method):
    """Searches scales, then clips.

    scale, clip  each search can be left out
    ratios       values of r in [0, 1) on the grid; 0 is always tried, so that scaling never costs anything
    exhaustive   try them all, as the authors; else every fourth, then the neighbours of the best at half the step
    pairs        all: every proved producer; paper: those with a scale for each channel; norms: norms alone
    """

    needs: ClassVar = (AbsMean, Hessian)

    scale: bool = True
    clip: bool = True
    ratios: int = 20
    exhaustive: bool = False
    pairs: Literal["all", "paper", "norms"] = "all"

    def __post_init__(self) -> None:
        at_least(self, 1, "ratios")

    @property
    def searches(self) -> bool:
        return self.scale

    def transform(self, group: InputGroup, stats: Stats) -> None:
        if not self.scale or not self._may_scale(group):
            return
        magnitude = stats[AbsMean].value.clamp(min=_TINY)

        @functools.cache
        def error(i: int) -> float:
            return group.error(scale_of(magnitude, i / self.ratios))

        step = 1 if self.exhaustive else max(1, self.ratios // 5)
        best = min(range(0, self.ratios, step), key=error)
        while step > 1:
            step //= 2
            best = min((i for i in (best - step, best, best + step) if 0 <= i < self.ratios), key=error)
        group.rescale(scale_of(magnitude, best / self.ratios))

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        if not self.clip:
            return round_to_nearest(weight, scheme.weight)
        params = clipped_params(weight, scheme.weight, stats[Hessian].value)
        return round_to_grid(weight, *params, scheme.weight)

    def _may_scale(self, group: InputGroup) -> bool:
        producer = group.producer
        if producer is None or (self.pairs == "norms" and not producer.is_norm):
            return False
        return self.pairs == "all" or producer.one_to_one


def scale_of(magnitude: Tensor, ratio: float) -> Tensor:
    """s = m^r of input magnitudes (K,), centred so that sqrt(max s * min s) is 1."""
    scale = magnitude**ratio
    return scale / torch.sqrt(scale.max() * scale.min())
