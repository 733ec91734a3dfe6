"""Salient weights: keep a small share of the input columns as floats, to compare criteria for choosing them.

Paper: Lin et al. 2023, arXiv 2306.00978, section 3.1 and table 1: 0.1, 1 and 3 % of columns chosen by activation, by
    weight norm or at random; section 3.2 and table 2: scale the chosen columns by s before rounding instead.
Differs: the chosen columns are stored both as codes and as float16 values, and bits_per_weight counts both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from harness.core import AbsMean, Method, QTensor, Scheme, Stat, Stats, round_to_nearest
from harness.core.formats import MixedQTensor, ScaledQTensor
from harness.core.formats.additive import half


@dataclass(frozen=True, kw_only=True)
class Salient(Method):
    """Rounds to nearest, and protects a share of the input columns.

    share   share of the input columns that are chosen; their number is rounded up
    choose  activation: by mean input magnitude; weight: by the norm of the column; random: at random from `seed`
    scale   null: chosen columns are kept as float16; s: they are multiplied by s, rounded with all others, divided by s
    """

    share: float = 0.01
    choose: Literal["activation", "weight", "random"] = "activation"
    scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} is out of range; expected more than 0, at most 1")
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale={self.scale} is out of range; expected more than 0, or null")

    @property
    def needs(self) -> Sequence[type[Stat]]:
        return (AbsMean,) if self.choose == "activation" else ()

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        columns = self._columns(weight, stats)
        if self.scale is None:
            rounded = round_to_nearest(weight, scheme.format)
            float_columns = half(weight[:, columns], "the largest weight of the float16 columns", weight)
            return MixedQTensor(rounded, columns, float_columns)
        scaled = weight.clone()
        scaled[:, columns] *= self.scale
        return ScaledQTensor(round_to_nearest(scaled, scheme.format), columns, self.scale)

    def _columns(self, weight: Tensor, stats: Stats) -> Tensor:
        """Indices (C,) of the chosen input columns of a weight (N, K), in increasing order."""
        count = math.ceil(self.share * weight.shape[1])
        if self.choose == "random":  # depends only on K: the same columns for all linears that read one input
            generator = torch.Generator().manual_seed(self.seed)
            return torch.randperm(weight.shape[1], generator=generator)[:count].sort().values.to(weight.device)
        importance = stats[AbsMean].value if self.choose == "activation" else weight.float().norm(dim=0)
        return importance.to(weight.device).topk(count).indices.sort().values
