"""any4: weighted k-means against a naive float64 version, and nearer outputs than without weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.core import AbsMean, LearnedWeight, Scheme, Stats, round_to_nearest
from methods.any4 import Any4

FORMAT = LearnedWeight(
    levels="learned", bits=3, granularity="group", group_size=16, levels_dtype="float32", scale_dtype="float32"
)
SCHEME = Scheme(name="learned_group64", weight=FORMAT)
WEIGHT = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
INPUTS = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)) * torch.linspace(-2, 2, 64).exp()


def statistics() -> Stats:
    stats = Stats([AbsMean], 64)
    stats.update(INPUTS)
    return stats


def naive(row: Tensor, importance: Tensor) -> Tensor:
    """The weight of one row, by scaling each group and Lloyd's iterations, one value at a time."""
    low, high = row.view(4, 16).amin(1), row.view(4, 16).amax(1)
    scale = (high - low) / 7
    values = ((row.view(4, 16) - low[:, None]) / scale[:, None]).flatten()
    shares = (scale[:, None] * importance.view(4, 16)).flatten()
    levels = values.sort().values[((torch.arange(8).double() + 0.5) / 8 * 64).long()]
    for _ in range(30):
        codes = torch.tensor([int((value - levels).abs().argmin()) for value in values])
        cells = [codes == code for code in range(8)]
        levels = torch.stack(
            [
                (values[cell] * shares[cell]).sum() / shares[cell].sum() if cell.any() else level
                for cell, level in zip(cells, levels, strict=True)
            ]
        )
    nearest = levels[torch.tensor([int((value - levels).abs().argmin()) for value in values])]
    return (nearest.view(4, 16) * scale[:, None] + low[:, None]).flatten()


def test_it_is_the_naive_version_in_float64() -> None:
    found = Any4().quantize(WEIGHT.double(), SCHEME, statistics()).dequantize(torch.float64)
    importance = INPUTS.double().abs().mean(0)
    expected = torch.stack([naive(row, importance) for row in WEIGHT.double()])
    assert float((found - expected).norm() / expected.norm()) < 0.02  # parameters are stored as float32
    assert float((found - expected).abs().gt(1e-3).float().mean()) < 0.02


def test_weights_bring_the_outputs_nearer() -> None:
    found = Any4().quantize(WEIGHT, SCHEME, statistics()).dequantize()
    unweighted = round_to_nearest(WEIGHT, FORMAT).dequantize()
    errors = [float((INPUTS @ (each - WEIGHT).T).norm()) for each in (found, unweighted)]
    assert errors[0] < 0.95 * errors[1]


def test_what_is_refused() -> None:
    scheme = Scheme(name="learned", weight=LearnedWeight(levels="learned"))
    with pytest.raises(ValueError, match="^scheme=learned has no levels of each row over groups; use scheme="):
        Any4().check(scheme)
