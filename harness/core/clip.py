"""Clipped ranges: for each group, the range of the grid that costs the least output error.

The error of a group of g inputs with weight error d (g,) is d H d^T with H (g, g) the group's diagonal block of the
Hessian: the expected squared output error, were the other groups exact. AWQ's clip search (Lin et al. 2023,
mit-han-lab/llm-awq auto_clip.py) measures the same on 512 tokens; H holds all of them and is cheaper to apply.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core import grid
from harness.core.scheme import WeightFormat

# The two ends of a range shrink together first, then each alone.
_TOGETHER = tuple(1 - i / 20 for i in range(1, 11))
_ALONE = (1.05, 0.95, 0.9, 0.85)
_CACHED = 2**19  # values of a weight that are searched at once


def clipped_params(weight: Tensor, fmt: WeightFormat, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight (N, K) whose groups' ranges are clipped where that lowers the error.

    `hessian` (K, K) is of the weight's inputs. Never worse than the minimum-maximum grid in its own objective.
    Returns: scale and zero_point as `grid.weight_params`.
    """
    grid.check_finite(weight)
    values = weight.to(grid.compute_dtype(weight))
    if fmt.granularity == "tensor":
        return _search(values, fmt, hessian)
    rows = max(1, _CACHED // values.shape[1])  # rows are apart; a few at a time stay in the processor's cache
    found = [_search(part, fmt, hessian) for part in values.split(rows)]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero_point for _, zero_point in found])


def _search(values: Tensor, fmt: WeightFormat, hessian: Tensor) -> tuple[Tensor, Tensor]:
    groups = grid.to_groups(values, fmt)
    low, high = groups.amin(-1), groups.amax(-1)
    scale, zero_point = grid.stored_params(low, high, fmt)
    blocks = _blocks(hessian.to(values), fmt, groups.shape)
    best = _errors(values, scale, zero_point, fmt, blocks)
    ends = low, high
    for stage in _stages(fmt):
        start = ends
        for shrink_low, shrink_high in stage:
            tried_ends = start[0] * shrink_low, start[1] * shrink_high
            tried = grid.stored_params(*tried_ends, fmt)
            error = _errors(values, *tried, fmt, blocks)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero_point = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero_point)
            ends = torch.where(better, tried_ends[0], ends[0]), torch.where(better, tried_ends[1], ends[1])
    return scale, zero_point


def group_errors(weight: Tensor, scale: Tensor, zero_point: Tensor, fmt: WeightFormat, hessian: Tensor) -> Tensor:
    """Error of rounding a weight (N, K) to a grid, for each group that has a scale: (N, G), or (1, 1) per tensor."""
    shape = grid.to_groups(weight, fmt).shape
    return _errors(weight, scale, zero_point, fmt, _blocks(hessian.to(weight), fmt, shape))


def _blocks(hessian: Tensor, fmt: WeightFormat, shape: torch.Size) -> Tensor:
    """The diagonal blocks (G, g, g) that groups of `shape` (N, G, g) meet; all of the Hessian per tensor."""
    if fmt.granularity == "tensor":
        return hessian
    _, count, size = shape
    return torch.stack([hessian[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)])


def _errors(weight: Tensor, scale: Tensor, zero_point: Tensor, fmt: WeightFormat, blocks: Tensor) -> Tensor:
    groups = grid.to_groups(weight, fmt)
    error = grid.snap(groups, scale[..., None], zero_point[..., None], fmt).sub_(groups)
    if fmt.granularity == "tensor":
        delta = error.view(weight.shape)
        return ((delta @ blocks) * delta).sum().view(1, 1)
    delta = error.transpose(0, 1)  # (G, N, g)
    return ((delta @ blocks).mul_(delta)).sum(-1).T


def _stages(fmt: WeightFormat) -> list[list[tuple[float, float]]]:
    """Factors for the low and the high end; each stage starts from the best range of the one before."""
    together = [(share, share) for share in _TOGETHER]
    if fmt.symmetric:
        return [together]
    return [together, [(share, 1.0) for share in _ALONE], [(1.0, share) for share in _ALONE]]
