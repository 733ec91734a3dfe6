"""Naive float64 versions of the formulas, written from the papers for the tests alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from harness.core.scheme import WeightFormat


def naive_rtn(weight: Tensor, fmt: WeightFormat) -> tuple[list[list[int]], Tensor]:
    """Codes and decoded values of round-to-nearest, one group and one value at a time, float32 scales."""
    rows, columns = weight.shape
    values = weight.double()
    codes = [[0] * columns for _ in range(rows)]
    decoded = torch.zeros_like(values)
    for cells in _groups(rows, columns, fmt):
        group = [float(values[i, j]) for i, j in cells]
        scale, zero_point = _params(group, fmt)
        for (i, j), value in zip(cells, group, strict=True):
            code = min(max(round(value / scale + zero_point), 0), 2**fmt.bits - 1)
            codes[i][j] = code
            decoded[i, j] = (code - zero_point) * scale
    return codes, decoded


def _groups(rows: int, columns: int, fmt: WeightFormat) -> list[list[tuple[int, int]]]:
    if fmt.granularity == "tensor":
        return [[(i, j) for i in range(rows) for j in range(columns)]]
    size = columns if fmt.group_size == -1 else fmt.group_size
    return [[(i, j) for j in range(start, start + size)] for i in range(rows) for start in range(0, columns, size)]


def _params(group: list[float], fmt: WeightFormat) -> tuple[float, float]:
    top = 2**fmt.bits - 1
    if fmt.symmetric:
        absmax = max(abs(value) for value in group)
        scale = 2 * absmax / top if fmt.grid == "full" else absmax / (2 ** (fmt.bits - 1) - 1)
        return _stored(scale) or 1.0, float(2 ** (fmt.bits - 1))
    low, high = min(group), max(group)
    if fmt.zero_point == "integer":
        low, high = min(low, 0.0), max(high, 0.0)
    scale = _stored((high - low) / top) or 1.0
    zero_point = -low / scale
    if fmt.zero_point == "float":
        return scale, _stored(zero_point)
    return scale, float(min(max(round(zero_point), 0), top))


def _stored(value: float) -> float:
    """The nearest float32: what the tests' formats store."""
    return float(torch.tensor(value, dtype=torch.float32))


def naive_perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean over windows of the mean nll, from whole logits in float64, one window at a time."""
    means = []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].double()
        log_p = torch.log_softmax(logits[:-1], -1)
        means.append(-sum(float(log_p[t, window[t + 1]]) for t in range(len(window) - 1)) / (len(window) - 1))
    return math.exp(sum(means) / len(means))
