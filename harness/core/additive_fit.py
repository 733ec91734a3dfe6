"""The three moves that fit additive codebooks to a weight: codebooks, scales, codes; none raises the error.

Egiazarian et al. 2024, arXiv 2401.06118, section 3: the error is tr(D H D^T) with D = W - W', H = X^T X, W' as in
`harness.core.additive`. Each is exact for what it moves, or searches where exactness is out of reach (codes).
Arrays: weight (N, K) float32, hessian (K, K) positive definite, codes (G, M, N) int64, codebooks (M, E, g), scale (N,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.core.additive import Gather
from harness.core.kmeans import smallest

_COLUMNS = 64  # columns between two updates of all that follow; decides speed alone
_SCORES = 1 << 20  # scores of candidates that are held at once, 4 MiB
_LEAST_ROWS = 64  # but no fewer rows than this
_CONVERGED = 1e-9  # of the squared gradient: what float32 resolves, beyond which directions are noise


@dataclass
class Fit:
    """Codes (G, M, N), codebooks (M, E, g) and scale (N,) that stand for one weight."""

    codes: Tensor
    codebooks: Tensor
    scale: Tensor

    def gather(self) -> Gather:
        return Gather(self.codes.permute(2, 0, 1).reshape(-1, self.codes.shape[1]), self.codebooks.shape[1])

    def vectors(self) -> Tensor:
        """The weight without its scale, (N, K)."""
        return self.gather().apply(self.codebooks).view(len(self.scale), -1)


class Problem:
    """A weight (N, K) and the Hessian (K, K) of its inputs, with what the three moves need of them again and again."""

    def __init__(self, weight: Tensor, hessian: Tensor, group_size: int) -> None:
        self.weight, self.hessian, self.size = weight, hessian, group_size
        self.product = weight @ hessian
        groups = weight.shape[1] // group_size
        own = hessian.view(groups, group_size, groups, group_size)
        self.diagonal = own.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()  # (G, g, g)
        self.lower, failed = torch.linalg.cholesky_ex(self.diagonal)
        if failed.any():
            raise ValueError("the damped Hessian is not positive definite in float32; use a larger damp")
        eye = torch.eye(group_size, dtype=weight.dtype, device=weight.device).expand_as(self.lower)
        self.inverse = torch.linalg.solve_triangular(self.lower, eye, upper=False)  # of `lower`

    def loss(self, fit: Fit) -> float:
        error = self.weight - fit.scale[:, None] * fit.vectors()
        return float(((error @ self.hessian) * error).sum(dtype=torch.float64))

    def rescale(self, fit: Fit) -> tuple[Tensor, float]:
        """Give each row its best scale, (w H v^T) / (v H v^T). Returns: (W - W') H, (N, K), and the error."""
        vectors = fit.vectors()
        image = vectors @ self.hessian
        norm = (vectors * image).sum(1)
        wanted = (self.weight * image).sum(1) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        fit.scale = torch.where(norm > 0, wanted, 0.0)
        slope = torch.addcmul(self.product, fit.scale[:, None], image, value=-1)
        error = torch.addcmul(self.weight, fit.scale[:, None], vectors, value=-1)
        return slope, float((slope * error).sum(dtype=torch.float64))

    def refit(self, fit: Fit, slope: Tensor, steps: int) -> None:
        """Move the codebooks towards the least squares solution, by `steps` conjugate gradients.

        `slope` is (W - W') H as `rescale` returned it. The preconditioner is the Hessian of each entry by itself.
        """
        gather, scale = fit.gather(), fit.scale[:, None]
        shape = fit.codebooks.shape
        solve = self._entry_inverse(gather, fit.scale, shape)
        residual = gather.transpose((scale * slope).view(-1, self.size))
        codebooks, direction, before, most = fit.codebooks.clone(), torch.zeros_like(fit.codebooks), 0.0, 0.0
        for _ in range(steps):
            better = (solve @ residual.view(-1, self.size, 1)).view(shape)
            power = float((residual * better).sum())
            most = max(most, power)
            if not power > _CONVERGED * most:
                break
            direction = better if not before else better + power / before * direction
            change = scale * gather.apply(direction).view_as(slope)
            image = change @ self.hessian
            curvature = float((change * image).sum())
            if not curvature > 0:
                break
            codebooks.add_(direction, alpha=power / curvature)
            residual.sub_(gather.transpose((scale * image).view(-1, self.size)), alpha=power / curvature)
            before = power
        fit.codebooks = codebooks

    def _entry_inverse(self, gather: Gather, scale: Tensor, shape: torch.Size) -> Tensor:
        """Inverses (M E, g, g) of what the error's curvature is if one entry moves by itself: sum s_r^2 H_jj."""
        groups, total = len(self.diagonal), shape[0] * shape[1]
        place = gather.index.view(-1, groups, shape[0]) * groups + torch.arange(groups, device=scale.device)[:, None]
        weights = scale.square()[:, None, None].expand(place.shape)
        uses = scale.new_zeros(total * groups).index_add_(0, place.view(-1).long(), weights.reshape(-1))
        blocks = (uses.view(total, groups) @ self.diagonal.view(groups, -1)).view(total, self.size, self.size)
        ridge = 1e-6 * blocks.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(scale.dtype).tiny ** 0.5
        found: Tensor = torch.linalg.inv(blocks + torch.diag_embed(ridge[:, None].expand(-1, self.size)))
        return found

    def search(self, fit: Fit, beam: int, generator: torch.Generator) -> None:
        """Choose all codes anew, one group after another, for every row what lowers its error.

        Groups go in runs of neighbours, the runs in random order. Of codebooks the first goes first, whose entries the
        others correct: a wider beam gains most so.
        """
        groups, width = len(self.diagonal), max(_COLUMNS // self.size, 1)
        runs = [slice(start, min(start + width, groups)) for start in range(0, groups, width)]
        scale = torch.where(fit.scale == 0, 1.0, fit.scale)
        error = torch.div(self.weight, scale[:, None]).sub_(fit.vectors())
        rows = max(_SCORES // (beam * fit.codebooks.shape[1]), _LEAST_ROWS)
        fit.codes = fit.codes.clone()
        for i in torch.randperm(len(runs), generator=generator).tolist():
            run = _Run(self, runs[i], fit.codebooks)
            for own, part in zip(fit.codes[runs[i]].split(rows, 2), error.split(rows), strict=True):
                run.search(part, own, beam)


class _Run:
    """Neighbouring groups, searched one after another before the errors of the others hear of it.

    Entries are kept in coordinates in which a group's own error is a plain distance: c L, with H_jj = L L^T.
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
        """Bring codes (b, M, n) of rows with `error` (n, K), and these errors, up to date."""
        slope = error @ self.hessian.T
        moves = torch.empty_like(slope)
        for i, own in enumerate(codes):
            here = slice(i * self.size, (i + 1) * self.size)
            gap = slope[:, here] @ self.inverse[i].T  # to the best vector, from the present one
            chosen, left = self._beam(i, gap, own, beam)
            better = left.square().sum(1) < gap.square().sum(1)
            own.copy_(torch.where(better, chosen, own))
            moves[:, here] = (gap - left).mul_(better[:, None]) @ self.inverse[i]
            slope[:, here.stop :].addmm_(moves[:, here], self.inner[here, here.stop :], alpha=-1)
        error[:, self.columns] -= moves

    def _beam(self, i: int, gap: Tensor, codes: Tensor, beam: int) -> tuple[Tensor, Tensor]:
        """Replace the codes (M, n) of one group in turn, keeping the `beam` best: codes (M, n), the gap left (n, g)."""
        kept, gaps = codes[:, :, None], gap[:, None]  # (M, n, P), (n, P, g)
        for m, entries in enumerate(self.entries[i]):
            wanted, last = gaps + _pick(entries, kept[m]), m + 1 == len(codes)
            if last and wanted.shape[1] > 1:
                origin = self._best(i, m, wanted)
                wanted, kept = _take(wanted, origin), kept.gather(2, origin.expand(len(kept), -1, -1))
            scores = self._scores(i, m, wanted)
            if wanted.shape[1] > 1:
                scores += wanted.square().sum(2, keepdim=True)
            count = 1 if last else min(beam, wanted.shape[1] * len(entries))
            code = smallest(scores.view(len(gap), -1), count)
            if not wanted.shape[1] == count == 1:
                origin, code = code // len(entries), code % len(entries)
                wanted, kept = _take(wanted, origin), kept.gather(2, origin.expand(len(kept), -1, -1))
            gaps = wanted - _pick(entries, code)
            kept = torch.cat([kept[:m], code[None], kept[m + 1 :]])
        return kept[:, :, 0], gaps[:, 0]

    def _scores(self, i: int, m: int, wanted: Tensor) -> Tensor:
        """Squared distances of `wanted` (n, P, g) to all entries, less its own square, (n, P, E)."""
        found = torch.addmm(self.norms[i, m], wanted.view(-1, self.size), self.tables[i, m])
        return found.view(*wanted.shape[:2], -1)

    def _best(self, i: int, m: int, wanted: Tensor) -> Tensor:
        """Which of P `wanted` (n, P, g) has the nearest entry, (n, 1). To find that entry again costs 1 / P of this."""
        return (self._scores(i, m, wanted).amin(2) + wanted.square().sum(2)).argmin(1, keepdim=True)


def _take(wanted: Tensor, origin: Tensor) -> Tensor:
    """Of `wanted` (n, P, g) those that `origin` (n, Q) names, (n, Q, g)."""
    return wanted.gather(1, origin[:, :, None].expand(-1, -1, wanted.shape[2]))


def _pick(entries: Tensor, codes: Tensor) -> Tensor:
    """entries[codes] of entries (E, g) and codes (n, P), (n, P, g); on a CPU, indexing takes several times as long."""
    return entries.index_select(0, codes.reshape(-1)).view(*codes.shape, -1)
