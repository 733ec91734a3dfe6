"""Rotate: turn the residual stream by a random orthogonal matrix, so that no channel of an input stands out.

Paper: Ashkboos et al. 2024, QuaRot, arXiv 2404.00456, section 4: norms folded, E <- E Q, W <- Q^T W of what writes into
    the stream, W <- W Q of what reads it, and a Hadamard transform of the inputs of down and output projections at run
    time. Folding LayerNorms: Ashkboos et al. 2024, SliceGPT, arXiv 2401.15024, section 3.
Differs: the input of the output projection is turned whole at run time, where the paper turns each head's values in
    v_proj and only the heads' axis at run time: the same matrix where head size and count are powers of two, at a
    little more time. Queries, keys and their cache are left as they are. Sizes that are no power of two times a known
    Hadamard matrix take the transform of harness.core.hadamard. Weights are rounded by whatever step and scheme
    follow: alone, to nearest on the minimum-maximum grid, without the authors' search of a clip by weight error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from harness.core import hadamard
from harness.core.method import Method
from harness.core.residual import Residual, Turn


@dataclass(frozen=True, kw_only=True)
class Rotate(Method):
    """Turns the float model, and rounds to nearest unless a later step quantizes.

    seed    of the random signs or of the random matrix
    kind    hadamard: random signs, then a Hadamard transform; orthogonal: a random matrix, from every one alike
    online  turn the inputs of linears that read no norm (output and down projections) at run time too; they are then
            called NAME.linear in the record. `skip` goes by the names of the float model; what it skips is turned too
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
    """The map x -> x Q of float64 values (..., D), D = `width`, with Q drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "hadamard":
        signs = hadamard.random_signs(width, generator).double()
        return lambda values: hadamard.rotate(values * signs.to(values.device))
    matrix = random_orthogonal(width, generator)
    return lambda values: values @ matrix.to(values.device)


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal (size, size) float64 matrix, uniform over all: QR of normal numbers with R's diagonal positive."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    found: Tensor = q * r.diagonal().sign()
    return found
