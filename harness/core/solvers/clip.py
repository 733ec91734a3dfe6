"""Clipped ranges: a search for the range of each group's grid that gives the least output error.

The error of a group of g inputs with weight error d (g,) is d H d^T, where H (g, g) is the group's diagonal block of
the Hessian: the expected squared output error if all other groups were exact. AWQ's clip search (Lin et al. 2023,
mit-han-lab/llm-awq auto_clip.py) measures this error on 512 tokens; H covers all tokens and is cheaper to apply.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core.formats import grid
from harness.core.scheme import WeightFormat

# Factors of the range: both ends shrink together first, then each end is moved alone.
_TOGETHER = tuple(1 - i / 20 for i in range(1, 11))
_ALONE = (1.05, 0.95, 0.9, 0.85)
_CACHED = 2**20  # values of a weight searched at once


def clipped_params(weight: Tensor, fmt: WeightFormat, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight (N, K); the range of a group is clipped where this lowers the error.

    `hessian` (K, K) belongs to the weight's inputs. No group has a larger error than on its minimum-maximum grid.
    Returns: scale and zero_point as `grid.weight_params`.
    Raises: ValueError if the weight has a NaN or an infinity, or a scale is too large for its dtype.
    """
    grid.check_finite(weight)
    values = weight.to(grid.compute_dtype(weight))
    if fmt.granularity == "tensor":
        return _search(values, fmt, hessian)
    rows = max(1, _CACHED // values.shape[1])  # rows are independent; a few at a time stay in the CPU cache
    params = [_search(part, fmt, hessian) for part in values.split(rows)]
    return torch.cat([scale for scale, _ in params]), torch.cat([zero_point for _, zero_point in params])


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
            trial_ends = start[0] * shrink_low, start[1] * shrink_high
            params = grid.stored_params(*trial_ends, fmt)
            error = _errors(values, *params, fmt, blocks)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero_point = torch.where(better, params[0], scale), torch.where(better, params[1], zero_point)
            ends = torch.where(better, trial_ends[0], ends[0]), torch.where(better, trial_ends[1], ends[1])
    return scale, zero_point


def group_errors(weight: Tensor, scale: Tensor, zero_point: Tensor, fmt: WeightFormat, hessian: Tensor) -> Tensor:
    """Error of rounding a weight (N, K) to a grid, one value per scale: (N, G), or (1, 1) per tensor."""
    shape = grid.to_groups(weight, fmt).shape
    return _errors(weight, scale, zero_point, fmt, _blocks(hessian.to(weight), fmt, shape))


def _blocks(hessian: Tensor, fmt: WeightFormat, shape: torch.Size) -> Tensor:
    """The Hessian's diagonal blocks (G, g, g) for groups of `shape` (N, G, g); the whole Hessian per tensor."""
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
    """Factors for the low and the high end of the range; each stage starts from the best range of the previous one."""
    together = [(share, share) for share in _TOGETHER]
    if fmt.symmetric:
        return [together]
    return [together, [(share, 1.0) for share in _ALONE], [(1.0, share) for share in _ALONE]]
