"""any4: levels of each row for values that are scaled by group, fitted by k-means that few activations weight.

Paper: Elhoushi and Johnson 2025, arXiv 2507.04610, section 3: each group of a row is put on the range of asymmetric
    integers; the levels of the row are the centres of k-means over these values, weighted by the scale of the group
    times the mean magnitude of the input.
Differs: Lloyd's algorithm starts from quantiles, the paper's from k-means++. All calibration tokens are used, for which
    the paper takes one prompt. Also at other widths than 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from harness.core import AbsMean, LearnedWeight, Method, QTensor, Scheme, Stats
from harness.core.finite import check_finite
from harness.core.formats import compute_dtype
from harness.core.solvers.silent import magnitudes

_FLOOR = 1e-4  # of an input's mean magnitude


@dataclass(frozen=True, kw_only=True)
class Any4(Method):
    """Levels of each row, weighted by the inputs."""

    needs: ClassVar = (AbsMean,)

    def check(self, scheme: Scheme) -> None:
        _levels_of(scheme)

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        check_finite(weight)
        fmt, exact = _levels_of(scheme), weight.to(compute_dtype(weight))
        groups = fmt.to_groups(exact)
        inputs = fmt.to_groups(magnitudes(stats[AbsMean].value.to(exact), _FLOOR)[None])
        return fmt.quantized(exact, fmt.fitted(groups, fmt.ranges(groups).scale[..., None] * inputs))


def _levels_of(scheme: Scheme) -> LearnedWeight:
    if isinstance(scheme.weight, LearnedWeight) and scheme.weight.granularity == "group":
        return scheme.weight
    raise ValueError(f"scheme={scheme.name} has no levels of each row over groups; use scheme=learned_group64")
