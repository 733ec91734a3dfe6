"""Clipped ranges: a search for the range of each group's grid that gives the least output error.

The error of a group of g inputs with weight error d (g,) is d H d^T, where H (g, g) is the group's diagonal block of
the Hessian: the expected squared output error if all other groups were exact. AWQ's clip search (Lin et al. 2023,
mit-han-lab/llm-awq auto_clip.py) measures this error on 512 tokens; H covers all tokens and is cheaper to apply.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from harness.core.finite import check_finite
from harness.core.formats.format import WeightFormat, compute_dtype, padded
from harness.core.formats.params import Params

_CACHED = 2**20  # values of a weight searched at once

_Found = tuple[Params, tuple[Tensor, Tensor]]


def clipped_params(weight: Tensor, fmt: WeightFormat, hessian: Tensor, whole: Tensor | None = None) -> Params:
    """The parameters of a weight (N, K); the range of a group is clipped where this lowers the error.

    `hessian` (K, K) belongs to the weight's inputs. `whole` is the factor of the whole tensor of which the weight is a
    part. A format whose ranges are not searched
    keeps its parameters. No group has a larger error than with its minimum and maximum.
    Returns: parameters as `fmt.weight_params`.
    Raises: ValueError if the weight has a NaN or an infinity, or a parameter is too large for its dtype.
    """
    if not fmt.shrinks:
        return fmt.weight_params(weight)
    return Params.cat([params for params, _ in _parts(weight, fmt, hessian, whole)])


def clipped_ends(weight: Tensor, fmt: WeightFormat, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends (N, G) of the ranges that `clipped_params` chooses; those of the groups if ranges are not searched."""
    if not fmt.shrinks:
        groups = fmt.to_groups(weight.to(compute_dtype(weight)))
        return groups.amin(-1), groups.amax(-1)
    low, high = zip(*(ends for _, ends in _parts(weight, fmt, hessian, None)), strict=True)
    return torch.cat(low), torch.cat(high)


def _parts(weight: Tensor, fmt: WeightFormat, hessian: Tensor, whole: Tensor | None) -> Iterator[_Found]:
    """Search the ranges of a few rows after another, which stay in the CPU cache."""
    check_finite(weight)
    values = weight.to(compute_dtype(weight))
    whole = fmt.whole(values) if whole is None else whole
    rows = max(1, _CACHED // values.shape[1] // fmt.height) * fmt.height
    for part in [values] if fmt.granularity == "tensor" else values.split(rows):
        yield _search(part, fmt, hessian, whole)


def _search(values: Tensor, fmt: WeightFormat, hessian: Tensor, whole: Tensor | None) -> _Found:
    """The parameters with the least error, and both ends of their ranges."""
    groups = fmt.to_groups(values)
    low, high = groups.amin(-1), groups.amax(-1)
    params = fmt.cover(low, high, whole)
    blocks = _blocks(hessian.to(values), fmt)
    best = _errors(values, params, fmt, blocks)
    ends = low, high
    for stage in fmt.shrinks:
        start = ends
        for shrink_low, shrink_high in stage:
            trial_ends = start[0] * shrink_low, start[1] * shrink_high
            trial = fmt.cover(*trial_ends, whole)
            error = _errors(values, trial, fmt, blocks)
            better = error < best
            best = torch.where(better, error, best)
            params = trial.where(better, params)
            ends = torch.where(better, trial_ends[0], ends[0]), torch.where(better, trial_ends[1], ends[1])
    return params, ends


def group_errors(weight: Tensor, params: Params, fmt: WeightFormat, hessian: Tensor) -> Tensor:
    """Error of rounding a weight (N, K) with these parameters, one value per scale: (N, G), or (1, 1) per tensor."""
    return _errors(weight, params, fmt, _blocks(hessian.to(weight), fmt))


def _blocks(hessian: Tensor, fmt: WeightFormat) -> Tensor:
    """The Hessian's diagonal blocks (G, g, g) for groups of g inputs, the last with zeros; all of it per tensor."""
    if fmt.granularity == "tensor":
        return hessian
    size = fmt.span(len(hessian))
    whole = padded(padded(hessian, size).T, size).T
    return torch.stack([whole[i : i + size, i : i + size] for i in range(0, len(whole), size)])


def _errors(weight: Tensor, params: Params, fmt: WeightFormat, blocks: Tensor) -> Tensor:
    shape = (weight.shape[0], weight.shape[1])
    groups = fmt.to_groups(weight)
    delta = fmt.from_groups(fmt.snap(groups, params.spread()).sub_(groups), shape)
    if fmt.granularity == "tensor":
        return ((delta @ blocks) * delta).sum().view(1, 1)
    span = blocks.shape[1]
    delta = padded(delta, span).view(shape[0], -1, span).transpose(0, 1)  # (G, N, g)
    by_row = ((delta @ blocks).mul_(delta)).sum(-1)  # (G, N)
    return padded(by_row, fmt.height).view(len(by_row), -1, fmt.height).sum(-1).T
