"""Naive float64 versions of the formulas, written from the papers and used only in tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.core import IntWeight

# Weight formats of every kind, with float32 scales.
FORMATS = {
    "channel": IntWeight(bits=3, scale_dtype="float32"),
    "group": IntWeight(bits=3, granularity="group", group_size=8, scale_dtype="float32"),
    "float_zero": IntWeight(bits=2, granularity="group", group_size=8, zero_point="float", scale_dtype="float32"),
    "tensor": IntWeight(bits=4, granularity="tensor", scale_dtype="float32"),
    "narrow": IntWeight(bits=4, symmetric=True, grid="narrow", scale_dtype="float32"),
    "full": IntWeight(bits=3, symmetric=True, grid="full", granularity="group", group_size=8, scale_dtype="float32"),
}


def naive_rtn(weight: Tensor, fmt: IntWeight) -> tuple[list[list[int]], Tensor]:
    """Codes and decoded values of round-to-nearest with float32 scales, one group and one value at a time."""
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


def _groups(rows: int, columns: int, fmt: IntWeight) -> list[list[tuple[int, int]]]:
    if fmt.granularity == "tensor":
        return [[(i, j) for i in range(rows) for j in range(columns)]]
    size = columns if fmt.group_size == -1 else fmt.group_size
    return [[(i, j) for j in range(start, start + size)] for i in range(rows) for start in range(0, columns, size)]


def _params(group: list[float], fmt: IntWeight) -> tuple[float, float]:
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
    """The nearest float32 value, as the formats of the tests store it."""
    return float(torch.tensor(value, dtype=torch.float32))


def naive_perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean over windows of the mean nll, from full float64 logits, one window at a time."""
    means = []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].double()
        log_p = torch.log_softmax(logits[:-1], -1)
        means.append(-sum(float(log_p[t, window[t + 1]]) for t in range(len(window) - 1)) / (len(window) - 1))
    return math.exp(sum(means) / len(means))


@dataclass
class Solved:
    """Result of a naive method: codes and decoded values (N, K), and the loss that the method minimises."""

    codes: list[list[int]]
    decoded: Tensor
    loss: float


def naive_damped(hessian: Tensor, damp: float) -> Tensor:
    """H + damp mean(diag H) I in float64."""
    exact = hessian.double()
    return exact + damp * float(exact.diagonal().mean()) * torch.eye(len(exact), dtype=torch.float64)


def naive_gptq(
    weight: Tensor,
    hessian: Tensor,
    fmt: IntWeight,
    damp: float,
    order: list[int] | None = None,
    dynamic_groups: bool = False,
) -> Solved:
    """GPTQ as optimal brain quantization in a fixed order: one column after another, with an updated inverse Hessian.

    Frantar et al. 2022, arXiv 2210.17323, equations 2 and 3. Ranges are computed from the original weight, or, with
    `dynamic_groups` (in the original column order), from the updated weight when a group's first column is reached.
    """
    rows, columns = weight.shape
    updated, inverse = weight.double().clone(), torch.linalg.inv(naive_damped(hessian, damp))
    params = {} if dynamic_groups else _cell_params(updated, fmt)
    codes, decoded, loss = [[0] * columns for _ in range(rows)], torch.zeros_like(updated), 0.0
    remaining = list(order or range(columns))
    while remaining:
        j = remaining.pop(0)
        if (0, j) not in params:
            params |= _cell_params(updated, fmt, j)
        for i in range(rows):
            codes[i][j], decoded[i, j] = _nearest(float(updated[i, j]), *params[i, j], fmt)
            error = (updated[i, j] - decoded[i, j]) / inverse[j, j]
            loss += float(error**2 * inverse[j, j])
            for k in remaining:
                updated[i, k] -= error * inverse[j, k]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return Solved(codes, decoded, loss)


def naive_ldlq(weight: Tensor, hessian: Tensor, fmt: IntWeight, damp: float) -> Solved:
    """LDLQ: H = (U + I) D (U + I)^T with U strictly upper, w'_k = Q(w_k + (w - w')_{<k} U_{<k, k}).

    Chee et al. 2023, arXiv 2307.13304, equation 2: the feedback term contains the errors of all previous columns.
    """
    rows, columns = weight.shape
    upper, diagonal = _udu(naive_damped(hessian, damp).tolist())
    params = _cell_params(weight.double(), fmt)
    codes, decoded, loss = [[0] * columns for _ in range(rows)], torch.zeros(rows, columns, dtype=torch.float64), 0.0
    for i in range(rows):
        exact = weight[i].double().tolist()
        for k in range(columns):
            target = exact[k] + sum((exact[j] - float(decoded[i, j])) * upper[j][k] for j in range(k))
            codes[i][k], decoded[i, k] = _nearest(target, *params[i, k], fmt)
            loss += diagonal[k] * (target - float(decoded[i, k])) ** 2
    return Solved(codes, decoded, loss)


def _udu(matrix: list[list[float]]) -> tuple[list[list[float]], list[float]]:
    """The unit upper triangular U and the diagonal D of matrix = U D U^T, from the last column to the first."""
    size = len(matrix)
    upper, diagonal = [[0.0] * size for _ in range(size)], [0.0] * size
    for k in reversed(range(size)):
        diagonal[k] = matrix[k][k] - sum(upper[k][j] ** 2 * diagonal[j] for j in range(k + 1, size))
        for i in range(k):
            partial = sum(upper[i][j] * upper[k][j] * diagonal[j] for j in range(k + 1, size))
            upper[i][k] = (matrix[i][k] - partial) / diagonal[k]
    return upper, diagonal


def _cell_params(
    weight: Tensor, fmt: IntWeight, column: int | None = None
) -> dict[tuple[int, int], tuple[float, float]]:
    """Scale and zero point of every value; with `column`, only of values in groups that include this column."""
    params: dict[tuple[int, int], tuple[float, float]] = {}
    for cells in _groups(weight.shape[0], weight.shape[1], fmt):
        if column is not None and column not in [j for _, j in cells]:
            continue
        params.update(dict.fromkeys(cells, _params([float(weight[i, j]) for i, j in cells], fmt)))
    return params


def _nearest(value: float, scale: float, zero_point: float, fmt: IntWeight) -> tuple[int, float]:
    code = min(max(round(value / scale + zero_point), 0), 2**fmt.bits - 1)
    return code, (code - zero_point) * scale


def naive_smoothquant_scale(inputs: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """Equation 4 of SmoothQuant, one channel at a time, for inputs (T, K) and the weights (N, K) that multiply them."""
    scales = []
    for j in range(inputs.shape[1]):
        activation = max(max(abs(float(x)) for x in inputs[:, j]), 1e-5)
        column = max(max(abs(float(w)) for weight in weights for w in weight[:, j]), 1e-5)
        scales.append(activation**alpha / column ** (1 - alpha))
    return torch.tensor(scales, dtype=torch.float64)


def naive_awq_search(
    inputs: Tensor,
    weights: list[Tensor],
    fmt: IntWeight,
    ratios: int,
    output: Callable[[list[Tensor]], Tensor],
    tied: list[int] | None = None,
) -> tuple[Tensor, list[float]]:
    """The best scale (K,) on AWQ's grid, and the error of every ratio: mean |output(Q(W s) / s) - output(W)|^2.

    `tied` assigns each channel to a set of channels; all channels of a set use the largest of their scales.
    """
    magnitude = [max(float(inputs[:, j].double().abs().mean()), 1e-4) for j in range(inputs.shape[1])]
    expected = output([weight.double() for weight in weights])
    scales, errors = [], []
    for k in range(ratios):
        scale = [value ** (k / ratios) for value in magnitude]
        middle = math.sqrt(max(scale) * min(scale))
        scale = [value / middle for value in scale]
        if tied is not None:
            scale = [max(s for s, other in zip(scale, tied, strict=True) if other == row) for row in tied]
        factor = torch.tensor(scale, dtype=torch.float64)
        rounded = [naive_rtn(weight.double() * factor, fmt)[1] / factor for weight in weights]
        scales.append(factor)
        errors.append(float((output(rounded) - expected).square().mean()))
    return scales[errors.index(min(errors))], errors


def naive_group_errors(weight: Tensor, decoded: Tensor, inputs: Tensor, fmt: IntWeight) -> Tensor:
    """Twice the mean over inputs (T, K) of each group's squared output error: (N, G), or (1, 1) per tensor."""
    rows, columns = weight.shape
    errors = []
    for cells in _groups(rows, columns, fmt):
        total = 0.0
        for x in inputs.double():
            outputs: dict[int, float] = {}
            for i, j in cells:
                outputs[i] = outputs.get(i, 0.0) + float(decoded[i, j] - weight[i, j]) * float(x[j])
            total += sum(value**2 for value in outputs.values())
        errors.append(2 * total / len(inputs))
    return torch.tensor(errors, dtype=torch.float64).view(fmt.groups((rows, columns)))


def naive_clip(weight: Tensor, hessian: Tensor, fmt: IntWeight, shares: list[float]) -> float:
    """The smallest error d H d^T of one group (1, K) over ranges whose two ends shrink by the same share."""
    exact = weight.double()
    best = math.inf
    for share in shares:
        group = [float(exact.min()) * share, float(exact.max()) * share]
        scale, zero_point = _params(group, fmt)
        error = torch.tensor([[_nearest(float(w), scale, zero_point, fmt)[1] - float(w) for w in exact[0]]])
        best = min(best, float(error.double() @ hessian.double() @ error.double().T))
    return best


def naive_shrink(error: float, beta: float, norm: float) -> float:
    """The shrinkage operator of HQQ for one value."""
    return math.copysign(max(abs(error) - abs(error) ** (norm - 1) / beta, 0.0), error) if error else 0.0


def naive_hqq(weight: Tensor, fmt: IntWeight, norm: float, beta: float, growth: float, iterations: int) -> Solved:
    """Half-quadratic quantization from integer zero points, one group at a time; the loss is the mean |W - W'|.

    Badri and Shaji 2023: e = shrink(W - W'), then zero_point = mean(code - (W - e) / scale). If zero points are
    integers, the scale is fitted to W - e by least squares instead. A group stops when its mean |W - W'| does not
    decrease.
    """
    rows, columns = weight.shape
    codes, decoded = [[0] * columns for _ in range(rows)], torch.zeros(rows, columns, dtype=torch.float64)
    for cells in _groups(rows, columns, fmt):
        group, coupling = [float(weight[i, j]) for i, j in cells], beta
        scale, zero_point = _params(group, fmt)
        zero_point = float(round(zero_point))
        rounded = [_nearest(w, scale, zero_point, fmt) for w in group]
        for _ in range(iterations):
            targets = [w - naive_shrink(w - d, coupling, norm) for w, (_, d) in zip(group, rounded, strict=True)]
            pairs = list(zip(targets, (code for code, _ in rounded), strict=True))
            fitted = scale, zero_point
            if fmt.zero_point == "float":
                fitted = scale, _stored(sum(code - target / scale for target, code in pairs) / len(pairs))
            elif (energy := sum((code - zero_point) ** 2 for _, code in pairs)) > 0:
                fitted = _stored(sum(target * (code - zero_point) for target, code in pairs) / energy), zero_point
            candidate = [_nearest(w, *fitted, fmt) for w in group]
            if _mean_error(candidate, group) >= _mean_error(rounded, group):
                break
            (scale, zero_point), rounded, coupling = fitted, candidate, coupling * growth
        for (i, j), (code, value) in zip(cells, rounded, strict=True):
            codes[i][j], decoded[i, j] = code, value
    return Solved(codes, decoded, float((decoded - weight.double()).abs().mean()))


def _mean_error(rounded: list[tuple[int, float]], exact: list[float]) -> float:
    return sum(abs(value - w) for (_, value), w in zip(rounded, exact, strict=True)) / len(exact)
