"""AWQ: scale input channels by the size of their activations, so that important channels are rounded more finely.

Paper: Lin et al. 2023, arXiv 2306.00978, equations 4 and 5: s = m^r with m_j = mean|x_j|, and r from a grid search on
    the output error of the module that contains the linears; then ranges are clipped by the error of each group.
Differs: the clip search uses the Hessian's diagonal blocks, which include all tokens (the authors' code,
    mit-han-lab/llm-awq auto_clip.py, uses 512), shrinks the two ends of a range independently, and includes the query
    and key projections. Every proved producer absorbs a scale; `pairs=paper` excludes the value projection with
    grouped queries, `pairs=norms` excludes everything except norms. The grid is searched from coarse to fine
    (`exhaustive=true`: in full, as the authors do), on `engine.search_tokens` tokens; on all tokens for a linear that
    is alone in its group. Inputs that are zero on all calibration tokens get the middle scale, and count as average
    inputs in the clip search, with a warning; the authors' lower bound would round their weights to zero. Where all
    inputs are below this bound, it is relative to the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from harness.core import (
    AbsMean,
    Hessian,
    InputGroup,
    Method,
    QTensor,
    Scheme,
    Stats,
    at_least,
    round_to_nearest,
)
from harness.core.solvers.clip import clipped_params
from harness.core.solvers.silent import fill_silent, magnitudes, warn_silent

_TINY = 1e-4  # the authors' lower bound of a mean magnitude


@dataclass(frozen=True, kw_only=True)
class AWQ(Method):
    """Searches scales for input channels, then clips ranges.

    scale, clip  false skips the search for scales, or the clipping
    ratios       number of values of r in [0, 1) on the grid; 0 is always tried, so scaling never raises the error
    exhaustive   true: try all values, as the authors do; false: try every fourth, then the neighbours of the best one
                 at half the step, and so on
    pairs        all: every proved producer; paper: producers with a separate scale for each channel; norms: only norms
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
        X_mean = magnitudes(stats[AbsMean].value, _TINY)

        errors: dict[int, float] = {}

        def best_of(candidates: Iterable[int]) -> int:
            for i in sorted(candidates, key=lambda i: abs(i - self.ratios // 2)):  # a low bound first saves most
                if i not in errors:
                    errors[i] = group.error(scale_of(X_mean, i / self.ratios), min(errors.values(), default=math.inf))
            return min(errors, key=lambda i: (errors[i], i))

        step = 1 if self.exhaustive else max(1, self.ratios // 5)
        best = best_of(range(0, self.ratios, step))
        while step > 1:
            step //= 2
            best = best_of(i for i in (best - step, best + step) if 0 <= i < self.ratios)
        group.rescale(scale_of(X_mean, best / self.ratios))

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        if not self.clip:
            return round_to_nearest(weight, scheme.format)
        H, silent = fill_silent(stats[Hessian].value)
        if silent.all():
            warn_silent(silent, "the weight is rounded to nearest")
            return round_to_nearest(weight, scheme.format)
        params = clipped_params(weight, scheme.format, H)
        scheme.format.check_scales(weight, params)
        return scheme.format.quantized(weight, params)

    def _may_scale(self, group: InputGroup) -> bool:
        producer = group.producer
        if producer is None or (self.pairs == "norms" and not producer.is_norm):
            return False
        return self.pairs == "all" or producer.one_to_one


def scale_of(magnitude: Tensor, ratio: float) -> Tensor:
    """s = m^r (K,) for mean input magnitudes m (K,), normalised so that sqrt(max s * min s) = 1."""
    scale = magnitude**ratio
    return scale / torch.sqrt(scale.max() * scale.min())
