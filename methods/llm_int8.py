"""LLM.int8(): 8-bit rows and tokens, with the few channels that carry outliers multiplied as floats.

Paper: Dettmers et al. 2022, arXiv 2208.07339, equations 7 and 8: the outlier channels of an input are found at run
    time, all others are multiplied as int8 with one scale a token and one a row. The ladder of its table 1 is a matter
    of the scheme: granularity of weights and activations, symmetric or not, with a threshold or without.
Differs: outliers are found for each sequence, not over a batch, so that a result does not depend on the batch.
    Weights are stored as int8 alone, as bitsandbytes does, so that outlier channels meet decoded codes;
    `outlier_weights=float16` is the paper's: columns whose inputs reached the threshold in calibration are kept as
    floats, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from harness.core.method import Method
from harness.core.qtensor import MixedQTensor, QTensor, round_to_nearest
from harness.core.scheme import Scheme
from harness.core.stats import MinMax, Stat, Stats


@dataclass(frozen=True, kw_only=True)
class LLMInt8(Method):
    """Rounds rows to int8; the scheme's activation format finds the outliers."""

    outlier_weights: Literal["int8", "float16"] = "int8"

    @property
    def needs(self) -> Sequence[type[Stat]]:
        return () if self.outlier_weights == "int8" else (MinMax,)

    def check(self, scheme: Scheme) -> None:
        if scheme.activation is None or scheme.activation.threshold is None:
            raise ValueError(
                f"scheme={scheme.name} has no activation.threshold, so nothing tells outliers; use scheme=llm_int8"
            )

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        found = round_to_nearest(weight, scheme.weight)
        if self.outlier_weights == "int8":
            return found
        assert scheme.activation is not None
        assert scheme.activation.threshold is not None
        columns = torch.nonzero(stats[MinMax].absmax >= scheme.activation.threshold).flatten().to(weight.device)
        return MixedQTensor(found, columns, weight[:, columns].to(torch.float16))
