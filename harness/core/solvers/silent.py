"""Silent inputs: channels that were exactly zero on all calibration tokens, such as a ReLU unit that never fired.

Their columns of a weight do not change the output error, so that a method that minimises it could set them to anything,
zero included. On other texts such a channel may fire. Its weights must therefore stay near their rounded values.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

_NEAR = 10
_SHARE = 1e-3


def fill_silent(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Give silent inputs the weight of an average input, in a copy: the mean of the other inputs on the diagonal.

    The errors of their columns then count, independently of all other columns, and are smallest if these columns are
    rounded to nearest. The mean of the diagonal, to which damping is relative, stays the same. A warning says how many
    inputs are silent. If none or all are, the Hessian is returned unchanged.
    Returns: the Hessian (K, K), and the mask (K,) of silent inputs.
    """
    diagonal = hessian.diagonal()
    silent = diagonal == 0
    count = int(silent.sum())
    if count in (0, len(silent)):
        return hessian, silent
    warn_silent(silent, "their weights are rounded to nearest", stacklevel=4)
    filled = hessian.clone()
    filled.diagonal()[silent] = diagonal[~silent].mean()
    return filled, silent


def warn_silent(silent: Tensor, consequence: str, stacklevel: int = 3) -> None:
    """Warn how many of K input channels are in the mask `silent` (K,), and what follows."""
    warnings.warn(
        f"{int(silent.sum())} of {len(silent)} input channels were silent on the calibration tokens; {consequence}",
        stacklevel=stacklevel,
    )


def bounded(values: Tensor, floor: float) -> Tensor:
    """Magnitudes (K,) with a lower bound above 0.

    `floor` is the bound of a method's authors, for magnitudes of the order of 1. If all magnitudes are near or below
    it, the bound is a share of the largest.
    """
    largest = float(values.max())
    return values.clamp(min=floor if largest >= _NEAR * floor or largest == 0 else largest * _SHARE)


def magnitudes(values: Tensor, floor: float) -> Tensor:
    """Magnitudes of inputs (K,), from which a method computes scales: `bounded`, and not extreme for silent inputs.

    These get the geometric mean of the smallest and the largest other magnitude; with the lower bound, their weights
    would be rounded to zero.
    """
    silent, positive = values == 0, bounded(values, floor)
    if not silent.any() or silent.all():
        return positive
    active = positive[~silent]
    return torch.where(silent, torch.sqrt(active.min() * active.max()), positive)
