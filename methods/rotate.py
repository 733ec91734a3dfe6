"""Rotate: multiply the residual stream by a random orthogonal matrix, so that no channel of an input is an outlier.

Paper: Ashkboos et al. 2024, QuaRot, arXiv 2404.00456, section 4: norms are folded, E <- E Q, W <- Q^T W for linears
    that write into the stream, W <- W Q for linears that read it, and a Hadamard transform at run time for the inputs
    of down and output projections. Folding LayerNorms: Ashkboos et al. 2024, SliceGPT, arXiv 2401.15024, section 3.
Differs: the whole input of the output projection is rotated at run time. The paper rotates each head's values in v_proj
    and only the head axis at run time: if head size and head count are powers of two, the matrix is the same and our
    run time is slightly longer. Queries, keys and their cache are not rotated. A size that is not a power of two times
    the size of a known Hadamard matrix uses the transform of harness.core.hadamard. Weights are quantized by the next
    method and the scheme; without one they are rounded to nearest on the minimum-maximum grid, without the authors'
    search for a clipping range by weight error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from harness.core import Method, Residual, Turn, hadamard


@dataclass(frozen=True, kw_only=True)
class Rotate(Method):
    """Rotates the float model, and rounds to nearest unless a later method quantizes.

    seed    of the random signs or of the random matrix
    kind    hadamard: random signs, then a Hadamard transform; orthogonal: a uniformly random orthogonal matrix
    online  also rotate, at run time, the inputs of linears that do not read a norm (output and down projections); the
            record calls them NAME.linear. `skip` uses the names of the float model; skipped linears are rotated too
    """

    seed: int = 0
    kind: Literal["hadamard", "orthogonal"] = "hadamard"
    online: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is out of range; expected 0 to 2^63 - 1")

    def rotate(self, residual: Residual) -> None:
        residual.fold()
        residual.turn(turn(residual.width, self.kind, self.seed))
        if self.online:
            residual.online()


def turn(width: int, kind: str, seed: int) -> Turn:
    """Return the map x -> x Q of float64 values (..., D), where D = `width` and `seed` determines Q."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "hadamard":
        signs = hadamard.random_signs(width, generator).double()
        return lambda values: hadamard.rotate(values * signs.to(values.device))
    Q = random_orthogonal(width, generator)
    return lambda values: values @ Q.to(values.device)


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Return a uniformly random orthogonal matrix (size, size) float64.

    It is the Q of the QR decomposition of a matrix of normal numbers, with signs such that R's diagonal is positive.
    """
    Q, R = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    rotation: Tensor = Q * R.diagonal().sign()
    return rotation
