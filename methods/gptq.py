"""GPTQ: quantize one column after another, and update the remaining columns to compensate for each error.

Paper: Frantar et al. 2022, arXiv 2210.17323, algorithm 1, with act_order, static groups and true sequential order as in
    the authors' code (IST-DASLab/gptq gptq.py).
Differs: `clip` shrinks a range where the Hessian's diagonal blocks show that this lowers the error; `clip=false` is the
    paper's minimum-maximum grid. At 3 bits, clipping gains more than all other options. Without static groups, a
    group's scale is computed from weights that are updated with all errors so far; the authors' code computes every
    second group of 64 from outdated weights, because it updates blocks of 128 columns. A Hessian that is not positive
    definite gets more damping, and the record has a warning. Columns of inputs that are zero on all calibration tokens
    are rounded to nearest, with a warning that counts them; the authors' code sets them to zero, and thereby removes
    units that other texts use.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.core import (
    Hessian,
    Method,
    QTensor,
    Scheme,
    Stat,
    Stats,
    WeightFormat,
    above_zero,
    at_least,
    round_to_nearest,
)
from harness.core.finite import check_finite
from harness.core.formats import Params, PermutedQTensor, compute_dtype
from harness.core.solvers.clip import clipped_params
from harness.core.solvers.columns import Columns, solve_columns
from harness.core.solvers.damping import cholesky, damped_factor
from harness.core.solvers.silent import fill_silent, warn_silent


@dataclass(frozen=True, kw_only=True)
class GPTQ(Method):
    """Second-order rounding with error feedback.

    damp             added to the Hessian's diagonal, as a share of the diagonal's mean
    act_order        quantize columns in order of decreasing Hessian diagonal
    static_groups    true: compute all ranges from the original weight; false: compute a group's range from the updated
                     weight when its first column is reached
    true_sequential  quantize the input groups of a block one after another, each with inputs from the quantized groups
                     before it; no effect with engine.propagate=float
    column_block     columns between two updates of all later columns; affects only speed
    clip             clip a range where that lowers the error of its group; false: the paper's grid
    """

    needs: ClassVar[Sequence[type[Stat]]] = (Hessian,)

    damp: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    true_sequential: bool = True
    column_block: int = 128
    clip: bool = True

    def __post_init__(self) -> None:
        above_zero(self, "damp")
        at_least(self, 1, "column_block")

    @property
    def sequential(self) -> bool:
        return self.true_sequential

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        check_finite(weight)
        if not int(stats[Hessian].tokens):
            warnings.warn("no calibration token reached this linear; its weight is rounded to nearest", stacklevel=2)
            return round_to_nearest(weight, scheme.format)
        fmt = scheme.format
        W = weight.to(compute_dtype(weight)).clone()
        H, silent = fill_silent(stats[Hessian].value.to(W.dtype))
        if silent.all():
            warn_silent(silent, "the weight is rounded to nearest")
            return round_to_nearest(weight, fmt)
        importance = H.diagonal().masked_fill(silent, 0)  # silent columns come last
        order = torch.argsort(importance, descending=True, stable=True) if self.act_order else None
        dynamic_groups = fmt.granularity == "group" and not self.static_groups
        group_order = order if dynamic_groups else None
        if group_order is not None:  # a group is consecutive columns of the new order
            W, H, order = W[:, group_order], H[group_order][:, group_order], None
        key = GPTQ, self.damp, self.act_order, W.dtype
        U = stats.shared(key, lambda: inverse_factor(H if order is None else H[order][:, order], self.damp))
        W = self._target(W, H, stats, group_order)
        params = None if dynamic_groups else self._params(W, fmt, H)
        columns = torch.arange(W.shape[1], device=W.device) if order is None else order
        W, U = self._start(W, U, stats, columns, group_order)
        Q, params = self._solve(W, H, U, fmt, params, order)
        fmt.check_scales(W, params)
        quantized = fmt.quantized(Q, params)
        return quantized if group_order is None else PermutedQTensor(quantized, group_order)

    def _target(self, W: Tensor, H: Tensor, stats: Stats, permuted: Tensor | None) -> Tensor:
        """The weight (N, K) whose outputs are wanted; other objectives change it.

        `permuted` (K,) are the input channels that the columns of W and H are; None: as they are.
        """
        return W

    def _start(
        self, W: Tensor, U: Tensor, stats: Stats, order: Tensor, permuted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The weight (N, K) and the factor U (K, K) with which algorithm 1 starts; other objectives change them.

        `order` (K,) is that in which columns of W are solved; `permuted` as in `_target`.
        """
        return W, U

    def _params(self, W: Tensor, fmt: WeightFormat, H: Tensor, whole: Tensor | None = None) -> Params:
        if self.clip:
            return clipped_params(W, fmt, H, whole)
        return fmt.weight_params(W) if whole is None else fmt.params(fmt.to_groups(W), whole)

    def _solve(
        self, W: Tensor, H: Tensor, U: Tensor, fmt: WeightFormat, params: Params | None, order: Tensor | None
    ) -> tuple[Tensor, Params]:
        """Run algorithm 1 on W (N, K) in column order `order`, with Hessian H (K, K).

        U (K, K) is the upper Cholesky factor of the inverse of H, with columns in the order in which they are solved.
        With `params` None, each group's parameters are computed when its first column is reached.

        Returns: Q (N, K), the rounded values with columns in their original order; the parameters.
        """
        N, K = W.shape
        size, whole = fmt.span(K), fmt.whole(W)
        permutation = torch.arange(K, device=W.device) if order is None else order
        rows = torch.arange(N, device=W.device)
        params_T = None if params is None else fmt.by_row(params, rows).map(_transposed)
        found: list[Params] = []
        W_T = W.T[permutation].contiguous()  # transposed: each column of W is contiguous
        Q_T = torch.empty_like(W_T)
        group_of = (permutation // size).tolist()
        step = self.column_block if params is not None else size * max(1, self.column_block // size)
        for start in range(0, K, step):
            stop = min(start + step, K)
            Err = torch.empty_like(W_T[start:stop])
            for first in range(start, stop, size) if params_T is None else (start,):
                if params_T is None:
                    last = first + size
                    found.append(self._params(W_T[first:last].T, _one_group(fmt), H[first:last, first:last], whole))
                    shared, groups = found[-1].map(_transposed), [0] * size
                else:
                    last, shared, groups = stop, params_T, group_of[start:stop]
                tensors = W_T[first:stop], Q_T[first:last], Err[first - start : last - start], U[first:last, first:stop]
                solve_columns(Columns(*tensors, shared, groups), fmt)
            W_T[stop:].addmm_(U[start:stop, stop:].T, Err, alpha=-1)
        Q = Q_T[permutation.argsort()].T
        return Q, Params.cat(found, 1) if params is None else params


def _transposed(values: Tensor) -> Tensor:
    return values.T.contiguous()


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor U (K, K) of the inverse of the damped Hessian: H^-1 = U^T U."""
    return damped_factor(hessian, damp, _factor_of_inverse)[0]


def _factor_of_inverse(matrix: Tensor) -> Tensor | None:
    """Upper U with matrix^-1 = U^T U; None if `matrix` is not positive definite in its own precision."""
    lower = cholesky(matrix)
    if lower is None:  # torch.cholesky_inverse would raise on the zero diagonal of an incomplete factor
        return None
    return cholesky(torch.cholesky_inverse(lower), upper=True)


def _one_group(fmt: WeightFormat) -> WeightFormat:
    return dataclasses.replace(fmt, granularity="channel", group_size=-1)
