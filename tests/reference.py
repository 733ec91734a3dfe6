"""Naive float64 versions of the formulas, written from the papers for the tests alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.core.scheme import WeightFormat

# Schemes of every kind, whose scales are stored as they are computed.
FORMATS = {
    "channel": WeightFormat(bits=3, scale_dtype="float32"),
    "group": WeightFormat(bits=3, granularity="group", group_size=8, scale_dtype="float32"),
    "float_zero": WeightFormat(bits=2, granularity="group", group_size=8, zero_point="float", scale_dtype="float32"),
    "tensor": WeightFormat(bits=4, granularity="tensor", scale_dtype="float32"),
    "narrow": WeightFormat(bits=4, symmetric=True, grid="narrow", scale_dtype="float32"),
    "full": WeightFormat(bits=3, symmetric=True, grid="full", granularity="group", group_size=8, scale_dtype="float32"),
}


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


@dataclass
class Solved:
    """What a naive rounding chose: codes and decoded values (N, K), and the loss in its own terms."""

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
    fmt: WeightFormat,
    damp: float,
    order: list[int] | None = None,
    moving: bool = False,
) -> Solved:
    """GPTQ as optimal brain quantization in a fixed order: one column after another, with the inverse Hessian kept.

    Frantar et al. 2022, arXiv 2210.17323, equations 2 and 3. Ranges are those of the weight as it was, or (`moving`,
    for groups, in their own order) of the updated one when a group's first column is reached.
    """
    rows, columns = weight.shape
    work, inverse = weight.double().clone(), torch.linalg.inv(naive_damped(hessian, damp))
    params = {} if moving else _cell_params(work, fmt)
    codes, decoded, loss = [[0] * columns for _ in range(rows)], torch.zeros_like(work), 0.0
    left = list(order or range(columns))
    while left:
        j = left.pop(0)
        if (0, j) not in params:
            params |= _cell_params(work, fmt, j)
        for i in range(rows):
            codes[i][j], decoded[i, j] = _nearest(float(work[i, j]), *params[i, j], fmt)
            error = (work[i, j] - decoded[i, j]) / inverse[j, j]
            loss += float(error**2 * inverse[j, j])
            for k in left:
                work[i, k] -= error * inverse[j, k]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return Solved(codes, decoded, loss)


def naive_ldlq(weight: Tensor, hessian: Tensor, fmt: WeightFormat, damp: float) -> Solved:
    """LDLQ: H = (U + I) D (U + I)^T with U strictly upper, w'_k = Q(w_k + (w - w')_{<k} U_{<k, k}).

    Chee et al. 2023, arXiv 2307.13304, equation 2: the feedback is of the errors made so far.
    """
    rows, columns = weight.shape
    upper, diagonal = _udu(naive_damped(hessian, damp).tolist())
    params = _cell_params(weight.double(), fmt)
    codes, decoded, loss = [[0] * columns for _ in range(rows)], torch.zeros(rows, columns, dtype=torch.float64), 0.0
    for i in range(rows):
        exact = weight[i].double().tolist()
        for k in range(columns):
            wanted = exact[k] + sum((exact[j] - float(decoded[i, j])) * upper[j][k] for j in range(k))
            codes[i][k], decoded[i, k] = _nearest(wanted, *params[i, k], fmt)
            loss += diagonal[k] * (wanted - float(decoded[i, k])) ** 2
    return Solved(codes, decoded, loss)


def _udu(matrix: list[list[float]]) -> tuple[list[list[float]], list[float]]:
    """The unit upper U and the diagonal D of matrix = U D U^T, last column first."""
    size = len(matrix)
    upper, diagonal = [[0.0] * size for _ in range(size)], [0.0] * size
    for k in reversed(range(size)):
        diagonal[k] = matrix[k][k] - sum(upper[k][j] ** 2 * diagonal[j] for j in range(k + 1, size))
        for i in range(k):
            known = sum(upper[i][j] * upper[k][j] * diagonal[j] for j in range(k + 1, size))
            upper[i][k] = (matrix[i][k] - known) / diagonal[k]
    return upper, diagonal


def _cell_params(
    weight: Tensor, fmt: WeightFormat, column: int | None = None
) -> dict[tuple[int, int], tuple[float, float]]:
    """Scale and zero point of every value, or of those in groups that hold one of `column`."""
    found: dict[tuple[int, int], tuple[float, float]] = {}
    for cells in _groups(weight.shape[0], weight.shape[1], fmt):
        if column is not None and column not in [j for _, j in cells]:
            continue
        found.update(dict.fromkeys(cells, _params([float(weight[i, j]) for i, j in cells], fmt)))
    return found


def _nearest(value: float, scale: float, zero_point: float, fmt: WeightFormat) -> tuple[int, float]:
    code = min(max(round(value / scale + zero_point), 0), 2**fmt.bits - 1)
    return code, (code - zero_point) * scale


def naive_smoothquant_scale(inputs: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """Equation 4 of SmoothQuant, one channel at a time: inputs (T, K), weights (N, K) that read them."""
    found = []
    for j in range(inputs.shape[1]):
        activation = max(max(abs(float(x)) for x in inputs[:, j]), 1e-5)
        column = max(max(abs(float(w)) for weight in weights for w in weight[:, j]), 1e-5)
        found.append(activation**alpha / column ** (1 - alpha))
    return torch.tensor(found, dtype=torch.float64)


def naive_awq_search(
    inputs: Tensor,
    weights: list[Tensor],
    fmt: WeightFormat,
    ratios: int,
    output: Callable[[list[Tensor]], Tensor],
    tied: list[int] | None = None,
) -> tuple[Tensor, list[float]]:
    """The best scale of AWQ's grid (K,) and the error of every ratio: mean |output(Q(W s) / s) - output(W)|^2.

    `tied` names, for each channel, the one whose scale it shares; they take the largest.
    """
    magnitude = [max(float(inputs[:, j].double().abs().mean()), 1e-4) for j in range(inputs.shape[1])]
    expected = output([weight.double() for weight in weights])
    scales, errors = [], []
    for k in range(ratios):
        scale = [value ** (k / ratios) for value in magnitude]
        middle = math.sqrt(max(scale) * min(scale))
        scale = [value / middle for value in scale]
        if tied is not None:
            scale = [max(s for s, other in zip(scale, tied, strict=True) if other == own) for own in tied]
        factor = torch.tensor(scale, dtype=torch.float64)
        rounded = [naive_rtn(weight.double() * factor, fmt)[1] / factor for weight in weights]
        scales.append(factor)
        errors.append(float((output(rounded) - expected).square().mean()))
    return scales[errors.index(min(errors))], errors


def naive_group_errors(weight: Tensor, decoded: Tensor, inputs: Tensor, fmt: WeightFormat) -> Tensor:
    """Twice the mean over inputs (T, K) of each group's squared output error, (N, G) or (1, 1) per tensor."""
    rows, columns = weight.shape
    found = []
    for cells in _groups(rows, columns, fmt):
        total = 0.0
        for x in inputs.double():
            outputs: dict[int, float] = {}
            for i, j in cells:
                outputs[i] = outputs.get(i, 0.0) + float(decoded[i, j] - weight[i, j]) * float(x[j])
            total += sum(value**2 for value in outputs.values())
        found.append(2 * total / len(inputs))
    return torch.tensor(found, dtype=torch.float64).view(fmt.groups((rows, columns)))


def naive_clip(weight: Tensor, hessian: Tensor, fmt: WeightFormat, shares: list[float]) -> float:
    """The least error d H d^T of one group (1, K) over ranges that shrink at both ends together."""
    exact = weight.double()
    best = math.inf
    for share in shares:
        group = [float(exact.min()) * share, float(exact.max()) * share]
        scale, zero_point = _params(group, fmt)
        error = torch.tensor([[_nearest(float(w), scale, zero_point, fmt)[1] - float(w) for w in exact[0]]])
        best = min(best, float(error.double() @ hessian.double() @ error.double().T))
    return best


def naive_shrink(error: float, beta: float, norm: float) -> float:
    """The shrinkage of HQQ on one value."""
    return math.copysign(max(abs(error) - abs(error) ** (norm - 1) / beta, 0.0), error) if error else 0.0


def naive_hqq(weight: Tensor, fmt: WeightFormat, norm: float, beta: float, growth: float, iterations: int) -> Solved:
    """Half-quadratic quantization from whole zero points, one group at a time; the loss is the mean |W - W'|.

    Badri and Shaji 2023: e = shrink(W - W'), then zero_point = mean(code - (W - e) / scale), or, where zero points are
    integers, the scale that fits W - e best to the codes. A group stops when its mean |W - W'| does not fall.
    """
    rows, columns = weight.shape
    codes, decoded = [[0] * columns for _ in range(rows)], torch.zeros(rows, columns, dtype=torch.float64)
    for cells in _groups(rows, columns, fmt):
        exact, now = [float(weight[i, j]) for i, j in cells], beta
        scale, zero_point = _params(exact, fmt)
        zero_point = float(round(zero_point))
        found = [_nearest(w, scale, zero_point, fmt) for w in exact]
        for _ in range(iterations):
            wanted = [w - naive_shrink(w - d, now, norm) for w, (_, d) in zip(exact, found, strict=True)]
            pairs = list(zip(wanted, (code for code, _ in found), strict=True))
            tried = scale, zero_point
            if fmt.zero_point == "float":
                tried = scale, _stored(sum(code - target / scale for target, code in pairs) / len(pairs))
            elif (power := sum((code - zero_point) ** 2 for _, code in pairs)) > 0:
                tried = _stored(sum(target * (code - zero_point) for target, code in pairs) / power), zero_point
            candidate = [_nearest(w, *tried, fmt) for w in exact]
            if _mean_off(candidate, exact) >= _mean_off(found, exact):
                break
            (scale, zero_point), found, now = tried, candidate, now * growth
        for (i, j), (code, value) in zip(cells, found, strict=True):
            codes[i][j], decoded[i, j] = code, value
    return Solved(codes, decoded, float((decoded - weight.double()).abs().mean()))


def _mean_off(found: list[tuple[int, float]], exact: list[float]) -> float:
    return sum(abs(value - w) for (_, value), w in zip(found, exact, strict=True)) / len(exact)
