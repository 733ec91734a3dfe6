"""LLM.int8(): 8-bit weight rows and 8-bit tokens; the few channels with outliers are multiplied as floats.

Paper: Dettmers et al. 2022, arXiv 2208.07339, equations 7 and 8: the outlier channels of an input are detected at
    run time; all other channels are multiplied as int8, with one scale per token and one per weight row. The steps of
    its table 1 are choices of the scheme: granularity of weights and activations, symmetric or not, with or without a
    threshold.
Differs: outliers are detected in each sequence separately, not over a batch, so that a result does not depend on the
    batch. All weights are stored as int8, as in bitsandbytes, so outlier channels are multiplied by decoded codes;
    `outlier_weights=float16` is the paper's variant: columns whose inputs reached the threshold in calibration are
    also stored as float16, and counted in bits_per_weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from harness.core import Method, MinMax, QTensor, Scheme, Stat, Stats, round_to_nearest
from harness.core.formats import MixedQTensor
from harness.core.formats.additive import half


@dataclass(frozen=True, kw_only=True)
class LLMInt8(Method):
    """Rounds weight rows to int8; the scheme's activation format detects the outliers at run time.

    outlier_weights  int8: outlier channels are multiplied by decoded codes; float16: the columns that reached the
                     threshold in calibration are stored as float16 too
    """

    outlier_weights: Literal["int8", "float16"] = "int8"

    @property
    def needs(self) -> Sequence[type[Stat]]:
        return () if self.outlier_weights == "int8" else (MinMax,)

    def check(self, scheme: Scheme) -> None:
        if scheme.activation is None or scheme.activation.threshold is None:
            raise ValueError(
                f"scheme={scheme.name} has no activation.threshold, so outliers cannot be detected; use scheme=llm_int8"
            )

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        rounded = round_to_nearest(weight, scheme.format)
        if self.outlier_weights == "int8":
            return rounded
        assert scheme.activation is not None
        assert scheme.activation.threshold is not None
        columns = torch.nonzero(stats[MinMax].absmax >= scheme.activation.threshold).flatten().to(weight.device)
        float_columns = half(weight[:, columns], "the largest weight of the float16 columns", weight)
        return MixedQTensor(rounded, columns, float_columns)
