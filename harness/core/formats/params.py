"""The numbers that map codes to values, which the values of a group share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_CACHED = 2**16  # values computed at once


@dataclass(frozen=True)
class Params:
    """Scale and zero point of each group; what a code means is up to the format.

    scale       one value per group: (R, G) for a weight
    zero_point  the same shape, in units of codes; None for formats in which it is fixed
    whole       a second factor, exact in float32, that all groups of a tensor share: () for a weight, one for each
                sequence of inputs; None for formats without one
    levels      for each row of a weight the values of its codes, (R, 2^bits) ascending; None where the format has them
    """

    scale: Tensor
    zero_point: Tensor | None = None
    whole: Tensor | None = None
    levels: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Params:
        """The same parameters with `change` applied to the tensors that have one value per group."""
        zero_point = None if self.zero_point is None else change(self.zero_point)
        return replace(self, scale=change(self.scale), zero_point=zero_point)

    def spread(self) -> Params:
        """With a last axis of 1, so that they broadcast against the values of groups."""
        whole = None if self.whole is None else self.whole[..., None]
        return replace(self.map(lambda values: values[..., None]), whole=whole)

    def rows(self, part: slice) -> Params:
        """Those of some of the rows."""
        return replace(self.map(lambda values: values[part]), levels=None if self.levels is None else self.levels[part])

    def slabs(self, groups: Tensor) -> Iterator[tuple[slice, Params]]:
        """A few rows of `groups` (R, G, n) after another, as many as stay in the CPU's cache; all on a GPU.

        Yields: the rows, and their parameters, spread.
        """
        rows = len(groups) if groups.is_cuda else max(1, _CACHED // max(1, groups[0].numel()))
        for start in range(0, len(groups), rows):
            part = slice(start, start + rows)
            yield part, self.rows(part).spread()

    def where(self, mask: Tensor, other: Params) -> Params:
        """These parameters in groups of the boolean `mask`, and those of `other` elsewhere."""
        scale = torch.where(mask, self.scale, other.scale)
        if self.zero_point is None or other.zero_point is None:
            return replace(self, scale=scale)
        return replace(self, scale=scale, zero_point=torch.where(mask, self.zero_point, other.zero_point))

    @staticmethod
    def cat(parts: Sequence[Params], dim: int = 0) -> Params:
        """The groups of all parts, one part behind another in dimension `dim`; `whole` is that of the first."""
        zero_points = [part.zero_point for part in parts if part.zero_point is not None]
        levels = [part.levels for part in parts if part.levels is not None]
        return replace(
            parts[0],
            scale=torch.cat([part.scale for part in parts], dim),
            zero_point=torch.cat(zero_points, dim) if zero_points else None,
            levels=torch.cat(levels) if levels else None,
        )
