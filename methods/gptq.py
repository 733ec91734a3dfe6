"""GPTQ: quantize column after column, and let the columns that are left make up for each error.

Paper: Frantar et al. 2022, arXiv 2210.17323, algorithm 1, with act_order, static groups and true sequential order as in
    the authors' code (IST-DASLab/gptq gptq.py).
Differs: ranges are clipped where the Hessian's diagonal blocks say that it costs less (`clip`; without it the paper's
    minimum-maximum grid), which is worth more than all else at 3 bits. A group's scale without static groups is taken
    from weights that all errors so far have reached, where the authors' code takes every second group of 64 from stale
    ones (its column block is 128). A Hessian that is not positive definite is damped more, and the record says so.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.core import grid
from harness.core.clip import clipped_params
from harness.core.damping import cholesky, damped_factor
from harness.core.method import Method
from harness.core.qtensor import PermutedQTensor, QTensor, round_to_grid, round_to_nearest
from harness.core.ranges import above_zero, at_least
from harness.core.scheme import Scheme, WeightFormat
from harness.core.stats import Hessian, Stats

Params = tuple[Tensor, Tensor]  # scale and zero point


@dataclass(frozen=True, kw_only=True)
class GPTQ(Method):
    """Second-order rounding with error feedback.

    damp             added to the Hessian's diagonal, as a share of its mean
    act_order        columns in order of decreasing diagonal of the Hessian
    static_groups    all ranges from the weight as it was; false: from updated weights, when a group is entered
    true_sequential  a block's groups one after another, each seeing the ones before quantized; without effect under
                     engine.propagate=float
    column_block     columns between two updates of all that follow; decides speed alone
    clip             clip ranges where that lowers the error of their group; false: the paper's grid
    """

    needs: ClassVar = (Hessian,)

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
        grid.check_finite(weight)
        if not int(stats[Hessian].tokens):
            warnings.warn("no calibration token reached it, so it is rounded to nearest", stacklevel=2)
            return round_to_nearest(weight, scheme.weight)
        fmt = scheme.weight
        values = weight.to(grid.compute_dtype(weight)).clone()
        hessian = stats[Hessian].value.to(values.dtype)
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        diagonal[dead], values[:, dead] = 1, 0
        order = torch.argsort(diagonal, descending=True, stable=True) if self.act_order else None
        moving = fmt.granularity == "group" and not self.static_groups
        if order is not None and moving:  # groups are of neighbours in the new order
            values, hessian = values[:, order], hessian[order][:, order]
        params = None if moving else self._params(values, fmt, hessian)
        solved = self._solve(values, hessian, fmt, params, None if moving else order)
        found = round_to_grid(*solved, fmt)
        return PermutedQTensor(found, order) if order is not None and moving else found

    def _params(self, weight: Tensor, fmt: WeightFormat, hessian: Tensor) -> Params:
        return clipped_params(weight, fmt, hessian) if self.clip else grid.weight_params(weight, fmt)

    def _solve(
        self,
        weight: Tensor,
        hessian: Tensor,
        fmt: WeightFormat,
        params: tuple[Tensor, Tensor] | None,
        order: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Algorithm 1 on a weight (N, K): the values on the grid with scale and zero point, columns in their own order.

        `params` None has each group's range found when its first column is reached.
        """
        rows, columns = weight.shape
        size = columns // fmt.groups((rows, columns))[1]
        path = torch.arange(columns, device=weight.device) if order is None else order
        factor = inverse_factor(hessian[path][:, path], self.damp)
        scale, zero_point = params or tuple(weight.new_empty(fmt.groups((rows, columns))) for _ in range(2))
        work = weight.T[path].contiguous()  # a column is a row here, contiguous
        chosen = torch.empty_like(work)
        group_of = (path // size).tolist()
        step = self.column_block if params is not None else size * max(1, self.column_block // size)
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            part, errors = work[start:stop], torch.empty_like(work[start:stop])
            inner = factor[start:stop, start:stop]
            for i in range(stop - start):
                g = group_of[start + i]
                if params is None and (start + i) % size == 0:
                    cells = slice(start + i, start + i + size)
                    found = self._params(part[i : i + size].T, _one_group(fmt), hessian[cells, cells])
                    scale[:, g : g + 1], zero_point[:, g : g + 1] = found
                chosen[start + i] = grid.snap(part[i], scale[:, g], zero_point[:, g], fmt)
                torch.div(part[i] - chosen[start + i], inner[i, i], out=errors[i])
                part[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1)
            work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        return chosen[path.argsort()].T, scale, zero_point


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor U of the damped inverse Hessian, H^-1 = U^T U, (K, K)."""
    return damped_factor(hessian, damp, _factor_of_inverse)[0]


def _factor_of_inverse(matrix: Tensor) -> Tensor | None:
    """Upper U with matrix^-1 = U^T U, None if `matrix` is not positive definite in its precision."""
    lower = cholesky(matrix)
    if lower is None:  # torch.cholesky_inverse raises where the diagonal of what is left of a factor has a zero
        return None
    return cholesky(torch.cholesky_inverse(lower), upper=True)


def _one_group(fmt: WeightFormat) -> WeightFormat:
    return dataclasses.replace(fmt, granularity="channel", group_size=-1)
