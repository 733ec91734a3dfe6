"""The three updates that fit additive codebooks to a weight: scales, codebooks, codes. No update raises the error.

Egiazarian et al. 2024, arXiv 2401.06118, section 3: the error is tr(D H D^T) with D = W - W', H = X^T X, W' as in
`harness.core.formats.additive`. The update of the scales is exact, that of the codebooks approaches the least squares
solution by conjugate gradients, and that of the codes is a beam search, because an exact search is infeasible.
Arrays: weight (N, K) float32, hessian (K, K) positive definite, codes (G, M, N) int64, codebooks (M, E, g), scale (N,).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.core.formats.additive import Gather
from harness.core.operators import operator
from harness.core.solvers.kmeans import smallest

_COLUMNS = 64  # columns searched between two updates of the whole error; chosen for speed only
_SCORES = 1 << 20  # scores of candidates in memory at once, 4 MiB
_LEAST_ROWS = 64  # rows searched at once, at least
_NATIVE_SIZE, _NATIVE_LANES = 8, 256  # the native search: size of a group, divisor of the entries
_CONVERGED = 1e-9  # share of the largest squared gradient; below it float32 resolves only noise


@dataclass
class Fit:
    """Codes (G, M, N), codebooks (M, E, g) and scale (N,) that represent one weight."""

    codes: Tensor
    codebooks: Tensor
    scale: Tensor

    def gather(self) -> Gather:
        return Gather(self.codes.permute(2, 0, 1).reshape(-1, self.codes.shape[1]), self.codebooks.shape[1])

    def vectors(self) -> Tensor:
        """The weight without its scale, (N, K)."""
        return self.gather().apply(self.codebooks).view(len(self.scale), -1)


class Problem:
    """A weight (N, K), the Hessian (K, K) of its inputs, and the products of both that every update reuses."""

    def __init__(self, weight: Tensor, hessian: Tensor, group_size: int) -> None:
        self.weight, self.hessian, self.size = weight, hessian, group_size
        self.product = weight @ hessian
        groups = weight.shape[1] // group_size
        blocks = hessian.view(groups, group_size, groups, group_size)
        self.diagonal = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()  # (G, g, g)
        self.lower, failed = torch.linalg.cholesky_ex(self.diagonal)
        if failed.any():
            raise ValueError("the damped Hessian is not positive definite in float32; use a larger damp")
        eye = torch.eye(group_size, dtype=weight.dtype, device=weight.device).expand_as(self.lower)
        self.inverse = torch.linalg.solve_triangular(self.lower, eye, upper=False)  # of `lower`

    def loss(self, fit: Fit) -> float:
        error = self.weight - fit.scale[:, None] * fit.vectors()
        return float(((error @ self.hessian) * error).sum(dtype=torch.float64))

    def rescale(self, fit: Fit) -> tuple[Tensor, float]:
        """Set each row's scale to the optimum, (w H v^T) / (v H v^T), for decoded rows v without scale.

        Returns: (W - W') H, (N, K), and the error.
        """
        vectors = fit.vectors()
        image = vectors @ self.hessian
        norm = (vectors * image).sum(1)
        optimum = (self.weight * image).sum(1) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        fit.scale = torch.where(norm > 0, optimum, 0.0)
        slope = torch.addcmul(self.product, fit.scale[:, None], image, value=-1)
        error = torch.addcmul(self.weight, fit.scale[:, None], vectors, value=-1)
        return slope, float((slope * error).sum(dtype=torch.float64))

    def refit(self, fit: Fit, slope: Tensor, steps: int) -> None:
        """Move the codebooks towards the least squares solution by up to `steps` steps of conjugate gradients.

        `slope` is (W - W') H as `rescale` returned it. The preconditioner is the Hessian of each entry alone.
        """
        gather, scale = fit.gather(), fit.scale[:, None]
        shape = fit.codebooks.shape
        solve = self._entry_inverse(gather, fit.scale, shape)
        residual = gather.transpose((scale * slope).view(-1, self.size))
        codebooks, direction, previous, largest = fit.codebooks.clone(), torch.zeros_like(fit.codebooks), 0.0, 0.0
        for _ in range(steps):
            preconditioned = (solve @ residual.view(-1, self.size, 1)).view(shape)
            power = float((residual * preconditioned).sum())
            largest = max(largest, power)
            if not power > _CONVERGED * largest:
                break
            direction = preconditioned if not previous else preconditioned + power / previous * direction
            change = scale * gather.apply(direction).view_as(slope)
            image = change @ self.hessian
            curvature = float((change * image).sum())
            if not curvature > 0:
                break
            codebooks.add_(direction, alpha=power / curvature)
            residual.sub_(gather.transpose((scale * image).view(-1, self.size)), alpha=power / curvature)
            previous = power
        fit.codebooks = codebooks

    def _entry_inverse(self, gather: Gather, scale: Tensor, shape: torch.Size) -> Tensor:
        """Inverses (M E, g, g) of the error's curvature in each entry alone: sum s_r^2 H_jj over its uses (r, j)."""
        groups, total = len(self.diagonal), shape[0] * shape[1]
        place = gather.index.view(-1, groups, shape[0]) * groups + torch.arange(groups, device=scale.device)[:, None]
        weights = scale.square()[:, None, None].expand(place.shape)
        uses = scale.new_zeros(total * groups).index_add_(0, place.view(-1).long(), weights.reshape(-1))
        blocks = (uses.view(total, groups) @ self.diagonal.view(groups, -1)).view(total, self.size, self.size)
        ridge = 1e-6 * blocks.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(scale.dtype).tiny ** 0.5
        inverses: Tensor = torch.linalg.inv(blocks + torch.diag_embed(ridge[:, None].expand(-1, self.size)))
        return inverses

    def search(self, fit: Fit, beam: int, generator: torch.Generator) -> None:
        """Choose all codes again, group by group, and keep a row's new codes of a group where they lower its error.

        Neighbouring groups form runs, which are searched in random order. The codebooks are searched in order: the
        later codebooks correct the entries of the first, and a wider beam gains most in this order.
        """
        groups, width = len(self.diagonal), max(_COLUMNS // self.size, 1)
        runs = [slice(start, min(start + width, groups)) for start in range(0, groups, width)]
        scale = torch.where(fit.scale == 0, 1.0, fit.scale)
        error = torch.div(self.weight, scale[:, None]).sub_(fit.vectors())
        rows = max(_SCORES // (beam * fit.codebooks.shape[1]), _LEAST_ROWS)
        fit.codes = fit.codes.clone()
        for i in torch.randperm(len(runs), generator=generator).tolist():
            run = _Run(self, runs[i], fit.codebooks)
            for codes, errors in zip(fit.codes[runs[i]].split(rows, 2), error.split(rows), strict=True):
                run.search(errors, codes, beam)


class _Run:
    """Neighbouring groups, searched one by one; the errors of all other groups are updated once, after the run.

    Entries c are stored as c L, with H_jj = L L^T: in these coordinates the error of a group alone is a Euclidean
    distance.
    """

    def __init__(self, problem: Problem, groups: slice, codebooks: Tensor) -> None:
        self.size = problem.size
        self.columns = slice(groups.start * self.size, groups.stop * self.size)
        self.hessian = problem.hessian[self.columns]  # symmetric
        self.inner = self.hessian[:, self.columns]
        self.inverse = problem.inverse[groups]
        self.entries = codebooks @ problem.lower[groups][:, None]  # (b, M, E, g)
        self.norms = self.entries.square().sum(-1)
        self.tables = self.entries.mT.mul(-2).contiguous()

    def search(self, error: Tensor, codes: Tensor, beam: int) -> None:
        """Update, in place, the codes (b, M, n) of n rows and the weight error (n, K) of these rows."""
        slope = error @ self.hessian.T
        moves = torch.empty_like(slope)
        native = _native(error, self.size, self.norms.shape[2], beam)
        if native is not None:
            native(codes, slope, moves, self.inverse, self.inner, self.entries, self.norms, self.tables, beam)
        else:
            self._search(slope, moves, codes, beam)
        error[:, self.columns] -= moves

    def _search(self, slope: Tensor, moves: Tensor, codes: Tensor, beam: int) -> None:
        """Update, in place, the codes (b, M, n) group by group, and `slope` and `moves` (n, b g) of the rows."""
        for i, group_codes in enumerate(codes):
            columns = slice(i * self.size, (i + 1) * self.size)
            gap = slope[:, columns] @ self.inverse[i].T  # from the present vector to the optimum
            chosen, remaining = self._beam(i, gap, group_codes, beam)
            better = remaining.square().sum(1) < gap.square().sum(1)
            group_codes.copy_(torch.where(better, chosen, group_codes))
            moves[:, columns] = (gap - remaining).mul_(better[:, None]) @ self.inverse[i]
            slope[:, columns.stop :].addmm_(moves[:, columns], self.inner[columns, columns.stop :], alpha=-1)

    def _beam(self, i: int, gap: Tensor, codes: Tensor, beam: int) -> tuple[Tensor, Tensor]:
        """Search the codes (M, n) of group i, codebook by codebook, with the `beam` best candidates of each row.

        `gap` (n, g) leads from the present vector to the optimum.
        Returns: the best codes (M, n), and the gap that remains with them, (n, g).
        """
        beams, gaps = codes[:, :, None], gap[:, None]  # (M, n, P), (n, P, g) for P candidates
        for m, entries in enumerate(self.entries[i]):
            targets, last = gaps + _pick(entries, beams[m]), m + 1 == len(codes)
            if last and targets.shape[1] > 1:
                origin = self._best(i, m, targets)
                targets, beams = _take(targets, origin), beams.gather(2, origin.expand(len(beams), -1, -1))
            scores = self._scores(i, m, targets)
            if targets.shape[1] > 1:
                scores += targets.square().sum(2, keepdim=True)
            count = 1 if last else min(beam, targets.shape[1] * len(entries))
            code = smallest(scores.view(len(gap), -1), count)
            if not targets.shape[1] == count == 1:
                origin, code = code // len(entries), code % len(entries)
                targets, beams = _take(targets, origin), beams.gather(2, origin.expand(len(beams), -1, -1))
            gaps = targets - _pick(entries, code)
            beams = torch.cat([beams[:m], code[None], beams[m + 1 :]])
        return beams[:, :, 0], gaps[:, 0]

    def _scores(self, i: int, m: int, targets: Tensor) -> Tensor:
        """Squared distances of `targets` (n, P, g) to all entries, minus |target|^2: (n, P, E)."""
        scores = torch.addmm(self.norms[i, m], targets.view(-1, self.size), self.tables[i, m])
        return scores.view(*targets.shape[:2], -1)

    def _best(self, i: int, m: int, targets: Tensor) -> Tensor:
        """Index (n, 1) of the one of P `targets` (n, P, g) that is nearest to an entry.

        The caller searches that entry again, which costs 1 / P of this search.
        """
        return (self._scores(i, m, targets).amin(2) + targets.square().sum(2)).argmin(1, keepdim=True)


def _take(targets: Tensor, origin: Tensor) -> Tensor:
    """Rows of `targets` (n, P, g) at the indices `origin` (n, Q): (n, Q, g)."""
    return targets.gather(1, origin[:, :, None].expand(-1, -1, targets.shape[2]))


def _pick(entries: Tensor, codes: Tensor) -> Tensor:
    """entries[codes], (n, P, g), of entries (E, g) and codes (n, P); several times as fast as indexing on a CPU."""
    return entries.index_select(0, codes.reshape(-1)).view(*codes.shape, -1)


def _native(rows: Tensor, size: int, entries: int, beam: int) -> Callable[..., Any] | None:
    """The native search, if it computes the same bits as torch for `rows` (n, K) and codebooks (entries, size)."""
    search, scores = operator("additive_search"), operator("additive_scores")
    possible = size == _NATIVE_SIZE and rows.device.type == "cpu" and entries % _NATIVE_LANES == 0
    if search is None or scores is None or not possible:
        return None
    same = (_same_scores(scores, count, entries, torch.get_num_threads()) for count in {len(rows), len(rows) * beam})
    return search if all(same) else None


@functools.cache
def _same_scores(scores: Callable[..., Any], rows: int, entries: int, threads: int) -> bool:
    """Whether native scores and squared lengths of `rows` targets are torch's to the bit.

    torch's products come from a library that may add in another order for other shapes and on other processors. Random
    values show it; a search with any other bits would choose other codes where two candidates are almost equal.
    """
    generator = torch.Generator().manual_seed(threads)
    targets, norms, table = (
        torch.randn(shape, generator=generator) for shape in ((rows, _NATIVE_SIZE), (entries,), (_NATIVE_SIZE, entries))
    )
    expected = torch.addmm(norms, targets, table), targets.square().sum(1)
    return all(map(torch.equal, scores(targets, norms, table), expected))
