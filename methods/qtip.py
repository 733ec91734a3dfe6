"""QTIP: rotate a weight randomly on both sides, then choose trellis codes of 16 columns at a time with feedback.

Paper: Tseng et al. 2024, arXiv 2406.11235: the bitshift trellis and its codes (section 3.1), tail-biting (section 3.3),
    block LDLQ over 16 columns with tiles of 16 by 16 (section 3.4); the rotation is that of QuIP# (arXiv 2402.04396).
Differs: for a size without a known Hadamard matrix, the rotation uses a Hartley matrix for the odd factor. The table of
    the HYB code is that of k-means, and is not trained. Trellises have 2^14 states by default, the paper's 2^16
    (`state_bits=16`) take four times as long for 3 % less error. The bits that close a path come from a part of the
    sequence. Fine-tuning trains one decoder block at a time, not the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.core import Finetuned, Hessian, QTensor, Scheme, Stats, above_zero, at_least, require_none
from harness.core.finite import check_finite
from harness.core.formats import compute_dtype
from harness.core.formats.trellis import LENGTH, Code, Trellis
from harness.core.formats.trellis_weight import TILE, TrellisQTensor, from_tiles, to_tiles
from harness.core.hadamard import random_signs, rotate
from harness.core.solvers.block_ldlq import Round, solve
from harness.core.solvers.incoherence import root_mean_square, rotated_hessian

_ALMOST_ZERO = 1e-30  # scale of a weight of zeros


@dataclass(frozen=True, kw_only=True)
class QTIP(Finetuned):
    """Trellis codes.

    bits        per weight: 2, 3 or 4
    code        how a state becomes values: 1mad or 3inst, by arithmetic; hyb: two at a time, with a table
    state_bits  of the trellis: more of them are more exact, and take twice the time each
    damp        added to the Hessian's diagonal, as a share of the diagonal's mean
    spread      root mean square of the weights, as a share of that of the code's values
    seed        of the random signs
    epochs      of fine-tuning the signs as real vectors, and the norms, block by block; 0: no fine-tuning
    """

    needs: ClassVar = (Hessian,)

    bits: int = 2
    code: Code = "1mad"
    state_bits: int = 14
    damp: float = 0.01
    spread: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "damp", "spread")
        at_least(self, 0, "seed")
        if self.bits not in (2, 3, 4):
            raise ValueError(f"bits={self.bits} is out of range for trellis codes; expected 2, 3 or 4")
        if not 8 <= self.state_bits <= 16:
            raise ValueError(f"state_bits={self.state_bits} is out of range; expected 8 to 16")

    def check(self, scheme: Scheme) -> None:
        require_none(scheme, "trellis codes")

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        check_finite(weight)
        N, K = weight.shape
        for name, size in (("out_features", N), ("in_features", K)):
            if size % TILE:
                raise ValueError(f"{name}={size} is not a multiple of {TILE}, the side of a tile; skip this linear")
        W, trellis = weight.to(compute_dtype(weight)), Trellis(self.code, self.bits, self.state_bits)
        generator = torch.Generator().manual_seed(self.seed)
        left, right = (random_signs(size, generator).to(W) for size in (N, K))
        W_T = rotate(rotate(W * right).T * left)  # (K, N): each column of the weight is contiguous
        H = rotated_hessian(stats, W, right)
        unit = float(trellis.values(W.device).square().mean().sqrt())
        scale = root_mean_square(W_T) / (unit * self.spread) or _ALMOST_ZERO
        columns: list[Tensor] = []  # of tiles, from the last to the first
        solve(W_T, H, self.damp, 0, _rounding(trellis, scale, columns), TILE)
        packed = torch.stack([trellis.pack(paths) for paths in reversed(columns)], 1)
        return TrellisQTensor(packed, trellis, torch.tensor(scale), left, right)


def _rounding(trellis: Trellis, scale: float, columns: list[Tensor]) -> Round:
    """Rounds 16 inputs (16, N) to the values of the nearest paths, (1, 16, N), and adds the paths to `columns`."""

    def rounded(vectors: Tensor) -> Tensor:
        tiles = to_tiles(vectors.T / scale)
        columns.append(trellis.nearest(tiles.reshape(-1, LENGTH)))
        values = trellis.along(columns[-1]).to(vectors).view(tiles.shape)
        return (from_tiles(values).T * scale)[None]

    return rounded
