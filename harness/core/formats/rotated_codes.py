"""Weights whose codes are those of a weight that is rotated on both sides.

    W = diag(left) Q_N V Q_K^T diag(right)

with Q of `hadamard` and signs left (N,), right (K,). A linear computes x W^T = ((x right) Q_K) V^T Q_N^T left: it
transforms the activations twice and never the weight.

Paper: Tseng et al. 2024, arXiv 2402.04396, section 3.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core.formats.additive import half
from harness.core.formats.packing import pack, unpack
from harness.core.formats.qtensor import QTensor, Tuner
from harness.core.hadamard import rotate, unrotate


class RotatedQTensor(QTensor):
    """Codes of a rotated weight (N, K).

    left, right  signs packed at 1 bit each; float16 vectors (N,), (K,) after fine-tuning
    """

    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor) -> None:
        """`left` (N,) and `right` (K,) are signs."""
        super().__init__((len(left), len(right)))
        self.register_buffer("left", pack((left < 0).to(torch.uint8), 1))
        self.register_buffer("right", pack((right < 0).to(torch.uint8), 1))

    @property
    @abstractmethod
    def step(self) -> Tensor:
        """The unit in which `slabs` gives V, ()."""

    @abstractmethod
    def slabs(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """V in units of `step`, one slab of rows at a time."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        left, right = self.vector("left", exact), self.vector("right", exact)
        return self._unrotated(exact).mul_(right).mul_(left[:, None]).to(dtype)

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """y = x W^T + b by transforms of inputs and outputs, in float32 or wider because they sum many terms."""
        exact = torch.promote_types(inputs.dtype, torch.float32)
        rotated = rotate(inputs.to(exact) * self.vector("right", exact)).to(inputs.dtype)
        products = [F.linear(rotated, slab) for slab in self.slabs(inputs.dtype)]
        outputs = unrotate(torch.cat(products, -1).to(exact)) * (self.vector("left", exact) * self.step)
        return (outputs if bias is None else outputs + bias).to(inputs.dtype)

    def tuner(self) -> Tuner:
        """A tuner of `left` and `right` as real vectors; the codes do not change (section 5 of the paper)."""
        unrotated = self._unrotated(torch.float32)
        initial = {name: self.vector(name, torch.float32) for name in ("left", "right")}

        def weight(values: dict[str, Tensor]) -> Tensor:
            return values["left"][:, None] * unrotated * values["right"]

        def linear(values: dict[str, Tensor], inputs: Tensor) -> Tensor:
            return F.linear(inputs * values["right"], unrotated) * values["left"]

        def accept(values: dict[str, Tensor]) -> None:
            for name, value in values.items():
                self.register_buffer(name, half(value, name))

        return Tuner(initial, weight, accept, linear)

    def vector(self, name: str, dtype: torch.dtype) -> Tensor:
        """`left` or `right` as numbers."""
        stored, count = self.get_buffer(name), self.shape[name == "right"]
        if stored.is_floating_point():
            return stored.to(dtype)
        return 1 - 2 * unpack(stored, 1, (count,)).to(dtype)

    def _unrotated(self, dtype: torch.dtype) -> Tensor:
        """Q_N V Q_K^T, (N, K)."""
        rows = unrotate(torch.cat(list(self.slabs(dtype))).mul_(self.step))
        return unrotate(rows.T).T.contiguous()
