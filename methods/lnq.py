"""LNQ: levels of each row and codes in turn, each the best for the other, by the Hessian.

Paper: Kim et al. 2025, arXiv 2505.07004 (GuidedQuant), section 4 and algorithm 2. The levels start from k-means that
    is weighted by the Hessian's diagonal (SqueezeLLM, Kim et al. 2023, arXiv 2306.07629, equation 2).
Differs: the Hessian is damped by a share of its mean diagonal, the paper adds 1e-7. A level that no weight has keeps
    its value. The codes are searched once more for the levels as they are stored. With `engine.gradients=true` it is
    the paper's combination with GuidedQuant.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.core import Hessian, LearnedWeight, Method, QTensor, Scheme, Stats, above_zero, at_least, round_to_nearest
from harness.core.finite import check_finite
from harness.core.formats import compute_dtype
from harness.core.formats.learned_weight import fit_levels
from harness.core.formats.levels import ranks
from harness.core.solvers.silent import fill_silent

_RIDGE = 1e-6  # of the least squares for the levels, as a share of the mean diagonal: holds levels that no weight has


@dataclass(frozen=True, kw_only=True)
class LNQ(Method):
    """Learned levels of each row, and codes by coordinate descent.

    damp          added to the Hessian's diagonal, as a share of the diagonal's mean
    rounds        of fitting levels and searching codes
    cycles        passes over all columns in each search
    column_block  columns between two updates of all others; affects only speed
    """

    needs: ClassVar = (Hessian,)

    damp: float = 0.01
    rounds: int = 3
    cycles: int = 4
    column_block: int = 64

    def __post_init__(self) -> None:
        above_zero(self, "damp")
        at_least(self, 1, "rounds", "cycles", "column_block")

    def check(self, scheme: Scheme) -> None:
        _levels_of(scheme)

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        check_finite(weight)
        fmt = _levels_of(scheme)
        if not int(stats[Hessian].tokens):
            warnings.warn("no calibration token reached this linear; its weight is rounded to nearest", stacklevel=2)
            return round_to_nearest(weight, fmt)
        W = weight.to(compute_dtype(weight))
        H = fill_silent(stats[Hessian].value.to(W))[0]
        H = H + self.damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
        levels = fit_levels(W, 1 << fmt.bits, H.diagonal())
        codes = ranks(W, levels).long()
        for _ in range(self.rounds):
            levels, codes = _refit(W, H, levels, codes)
            codes = self._search(W, H, levels, codes)
        params = fmt.stored_params(levels)
        assert params.levels is not None
        codes = self._search(W, H, params.levels, codes)
        return fmt.coded(codes.to(torch.uint8), params)

    def _search(self, W: Tensor, H: Tensor, levels: Tensor, codes: Tensor) -> Tensor:
        """Codes (N, K) by coordinate descent on (w' - w) H (w' - w)^T from `codes`, for ascending `levels` (N, L)."""
        H_T, levels_T = H.contiguous(), levels.T.contiguous()
        borders = ((levels[:, 1:] + levels[:, :-1]) / 2).T.contiguous()  # (L - 1, N)
        values = levels.gather(1, codes).T.contiguous()  # (K, N), as all of the following
        codes, slope = codes.T.contiguous(), H_T @ (values - W.T)
        for _ in range(self.cycles):
            for start in range(0, len(values), self.column_block):
                stop = min(start + self.column_block, len(values))
                before, part = values[start:stop].clone(), slope[start:stop].clone()
                for i in range(start, stop):
                    target = values[i] - part[i - start] / H_T[i, i]
                    codes[i] = (target > borders).sum(0)
                    value = levels_T.gather(0, codes[i][None])[0]
                    part.addr_(H_T[i, start:stop], value - values[i])
                    values[i] = value
                slope.addmm_(H_T[:, start:stop], values[start:stop] - before)
        return codes.T.contiguous()


def _refit(W: Tensor, H: Tensor, levels: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The levels (N, L) that minimise (w' - w) H (w' - w)^T for fixed codes (N, K), by least squares for each row.

    Returns: the levels, ascending, and the codes of the same values.
    """
    count, ridge = levels.shape[1], _RIDGE * H.diagonal().mean()
    fitted = torch.empty_like(levels)
    for rows in torch.arange(len(W), device=W.device).split(max(1, 2**24 // (len(H) * count))):
        P = torch.nn.functional.one_hot(codes[rows], count).to(W.dtype)  # (R, K, L)
        HP = torch.matmul(H, P)
        A, b = P.mT @ HP, (HP.mT @ W[rows][..., None])[..., 0]
        A.diagonal(dim1=1, dim2=2).add_(ridge)
        fitted[rows] = torch.linalg.solve(A, b + ridge * levels[rows])
    ascending = fitted.sort(1)
    return ascending.values, ascending.indices.argsort(1).gather(1, codes)


def _levels_of(scheme: Scheme) -> LearnedWeight:
    if isinstance(scheme.weight, LearnedWeight) and scheme.weight.granularity == "channel":
        return scheme.weight
    raise ValueError(f"scheme={scheme.name} is not levels of each row alone; use levels, such as scheme=learned")
