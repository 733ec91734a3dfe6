"""GPTQ's loop over columns: round one column after another, and let later columns compensate for its error.

Frantar et al. 2022, arXiv 2210.17323, algorithm 1, inner loop. The native library has the same loop with the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from harness.core.formats.format import Format
from harness.core.formats.integer import IntFormat
from harness.core.formats.integer_weight import IntWeight
from harness.core.formats.params import Params
from harness.core.operators import operator

_CAPABLE = ("AVX2", "AVX512")  # processors, as torch names them, that have the instructions of the operator


@dataclass(frozen=True)
class Columns:
    """Consecutive columns of a weight that are solved one after another, all transposed.

    weight      (C', N) these C columns and later ones, which are updated; changed in place
    values      (C, N) receives the rounded columns
    errors      (C, N) receives their errors, divided by the pivots
    factor      (C, C') rows of the upper Cholesky factor of the inverse Hessian, from the diagonal on
    params      of the groups, (G, N)
    groups      for each of the C columns its row of the parameters
    """

    weight: Tensor
    values: Tensor
    errors: Tensor
    factor: Tensor
    params: Params
    groups: list[int]


def solve_columns(columns: Columns, fmt: Format) -> None:
    """Round each column to the format, and subtract its error from all later columns of `columns.weight`."""
    native = operator("solve_columns")
    if native is not None and isinstance(fmt, IntFormat) and _suits(columns) and _rounds_as_torch(native):
        _solve_natively(native, columns, fmt)
    else:
        _solve(columns, fmt)


def _suits(columns: Columns) -> bool:
    """Whether the operator takes these columns: float32 on a CPU, and a scale for each output."""
    weight, outputs = columns.weight, columns.weight.shape[1]
    on_cpu = weight.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in _CAPABLE
    return on_cpu and weight.dtype == torch.float32 and columns.params.scale.shape[1] == outputs > 1


def _solve(columns: Columns, fmt: Format) -> None:
    W, U = columns.weight, columns.factor
    params = [columns.params.map(itemgetter(g)) for g in range(len(columns.params.scale))]
    rows = map(torch.unbind, (columns.values, columns.errors, U, U.diagonal()))
    for i, (g, q, err, u, pivot) in enumerate(zip(columns.groups, *rows, strict=True)):
        w = W[i]
        fmt.snap(w, params[g], out=q)
        torch.sub(w, q, out=err).div_(pivot)
        W[i + 1 :].addr_(u[i + 1 :], err, alpha=-1)


def _solve_natively(native: Callable[..., Any], columns: Columns, fmt: IntFormat) -> None:
    scale, zero_point = columns.params.scale, columns.params.zero_point
    low, high = (0, fmt.max_code) if zero_point is not None else (-fmt.mid_code, fmt.mid_code - 1)
    tensors = columns.weight, columns.values, columns.errors, columns.factor, scale
    unread = scale  # takes the place of a zero point that is fixed
    native(*tensors, unread if zero_point is None else zero_point, columns.groups, low, high, zero_point is None)


@functools.cache
def _rounds_as_torch(native: Callable[..., Any]) -> bool:
    """Whether the operator rounds products as this build of torch does, which fuses some with their sum: measured."""
    generator = torch.Generator().manual_seed(0)
    shape, fmt = (9, 39), IntWeight(bits=4)
    weight, scale, zero_point = (
        torch.rand(size, generator=generator) for size in (shape, (1, shape[1]), (1, shape[1]))
    )
    factor = torch.rand(shape[0], shape[0], generator=generator)
    results = []
    for solve in (_solve, functools.partial(_solve_natively, native)):
        values, errors = torch.empty(2, *shape)
        columns = Columns(weight.clone(), values, errors, factor, Params(scale, zero_point), [0] * shape[0])
        solve(columns, fmt)
        results.append(torch.stack([columns.weight, values, errors]))
    return torch.equal(*results)
