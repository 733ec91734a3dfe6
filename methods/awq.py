"""AWQ: scale input channels by how large their activations are, so that what matters is rounded more finely.

Paper: Lin et al. 2023, arXiv 2306.00978, equations 4 and 5: s = m^r with m_j = mean|x_j|, and r from a grid search on
    the output error of the module that the linears belong to; then ranges are clipped by the error of each group.
Differs: the clip search works on the Hessian's diagonal blocks, which hold all tokens where the authors' code
    (mit-han-lab/llm-awq auto_clip.py) takes 512, shrinks both ends of a range apart, and covers query and key too.
    Every proved producer absorbs a scale; `pairs=paper` leaves out the value projection under grouped queries,
    `pairs=norms` all but norms. The search sees `engine.search_tokens` tokens, for a linear alone in its group all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from harness.core.clip import clipped_params
from harness.core.method import InputGroup, Method
from harness.core.qtensor import QTensor, round_to_grid, round_to_nearest
from harness.core.scheme import Scheme
from harness.core.stats import AbsMean, Hessian, Stats

_TINY = 1e-4  # the authors' floor


@dataclass(frozen=True, kw_only=True)
class AWQ(Method):
    """Searches scales, then clips.

    scale, clip  each search can be left out
    ratios       how many values of r in [0, 1) are tried; 0 is among them, so that scaling never costs anything
    pairs        all: every proved producer; paper: those with a scale for each channel; norms: norms alone
    """

    needs: ClassVar = (AbsMean, Hessian)

    scale: bool = True
    clip: bool = True
    ratios: int = 20
    pairs: Literal["all", "paper", "norms"] = "all"

    def __post_init__(self) -> None:
        if self.ratios < 1:
            raise ValueError(f"ratios={self.ratios} is out of range; expected 1 or more")

    @property
    def searches(self) -> bool:
        return self.scale

    def transform(self, group: InputGroup, stats: Stats) -> None:
        if not self.scale or not self._may_scale(group):
            return
        magnitude = stats[AbsMean].value
        group.rescale(min(self._candidates(magnitude), key=group.error))

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

    def _candidates(self, magnitude: Tensor) -> list[Tensor]:
        """s = m^r, centred so that sqrt(max s * min s) is 1."""
        found = []
        for i in range(self.ratios):
            scale = magnitude.clamp(min=_TINY) ** (i / self.ratios)
            found.append(scale / torch.sqrt(scale.max() * scale.min()))
        return found
