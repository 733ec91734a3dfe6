"""QTIP's format: trellis codes of tiles of 16 by 16 values of a weight that is rotated on both sides.

    V = scale * values of the paths; a path goes through a tile of V row by row; V is that of `rotated_codes`

Paper: Tseng et al. 2024, arXiv 2406.11235, section 3.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from harness.core.formats.rotated_codes import RotatedQTensor
from harness.core.formats.trellis import Trellis

TILE = 16


class TrellisQTensor(RotatedQTensor):
    """Codes of a rotated weight (N, K), both multiples of 16.

    packed  (N / 16, K / 16, 32 bits) uint8: a circle of bits for each tile
    scale   () float32
    """

    kernel: ClassVar[str] = "trellis"

    packed: Tensor
    scale: Tensor

    def __init__(self, packed: Tensor, trellis: Trellis, scale: Tensor, left: Tensor, right: Tensor) -> None:
        super().__init__(left, right)
        self.trellis = trellis
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale.float())

    @property
    def step(self) -> Tensor:
        return self.scale

    def slabs(self, dtype: torch.dtype) -> Iterator[Tensor]:
        height = self._slab_rows(whole=TILE) // TILE
        for tiles in self.packed.split(height):
            paths = self.trellis.decode(tiles.flatten(0, 1))
            yield from_tiles(paths.view(*tiles.shape[:2], TILE, TILE)).to(dtype)


def to_tiles(matrix: Tensor) -> Tensor:
    """A matrix (R, C) as tiles (R / 16, C / 16, 16, 16)."""
    rows, columns = matrix.shape
    return matrix.reshape(rows // TILE, TILE, columns // TILE, TILE).transpose(1, 2)


def from_tiles(tiles: Tensor) -> Tensor:
    """The inverse of `to_tiles`."""
    return tiles.transpose(1, 2).flatten(0, 1).flatten(1, 2)
