"""The statistics of a linear's inputs that several methods, or runs themselves, collect."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from harness.core.stats import Stat

_PANEL = 192  # columns of a Hessian computed at once


class MinMax(Stat):
    """Smallest and largest input of each channel over all tokens, (K,), widened to include 0.0."""

    cached = True

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.lows = torch.zeros(in_features)
        self.highs = torch.zeros(in_features)

    def update(self, inputs: Tensor, reference: Tensor) -> None:
        self.lows = torch.minimum(self.lows.to(inputs.device), inputs.amin(0).float())
        self.highs = torch.maximum(self.highs.to(inputs.device), inputs.amax(0).float())

    def rescale(self, scale: Tensor) -> None:
        self.lows, self.highs = (bounds.to(scale.device) / scale for bounds in (self.lows, self.highs))

    @property
    def low(self) -> Tensor:
        return self.lows.amin()

    @property
    def high(self) -> Tensor:
        return self.highs.amax()

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude of each channel, (K,)."""
        return torch.maximum(self.highs, -self.lows)


class AbsMean(Stat):
    """Mean magnitude of each input channel, `value` (K,)."""

    cached = True

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.total = torch.zeros(in_features, dtype=torch.float64)
        self.tokens = torch.zeros((), dtype=torch.int64)

    def update(self, inputs: Tensor, reference: Tensor) -> None:
        self.total = self.total.to(inputs.device) + inputs.abs().sum(0, dtype=torch.float64)
        self.tokens = self.tokens + len(inputs)

    def rescale(self, scale: Tensor) -> None:
        self.total = self.total.to(scale.device) / scale

    @property
    def value(self) -> Tensor:
        return (self.total / self.tokens.clamp(min=1)).float()


class _Moment(Stat):
    """2/T times a sum over all T tokens of products of two numbers of a token, `value` (K, K) float32."""

    weighted = True

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.total = torch.zeros(in_features, in_features)
        self.tokens = torch.zeros((), dtype=torch.int64)

    def rescale(self, scale: Tensor) -> None:
        self.total = self.total.to(scale.device) / (scale[:, None] * scale)

    @property
    def value(self) -> Tensor:
        return self.total * (2.0 / self.tokens.clamp(min=1))

    def _rows(self, inputs: Tensor) -> Tensor:
        """A batch (T, K) in at least float32; counts its tokens, and brings `total` to its device and dtype."""
        rows = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        self.total = self.total.to(device=rows.device, dtype=rows.dtype)
        self.tokens = self.tokens + len(inputs)
        return rows


class Hessian(_Moment):
    """H = 2/T sum x x^T over all T tokens, `value` (K, K) float32: the Hessian of a linear's squared output error.

    Frantar et al. 2022, arXiv 2210.17323, section 3 (their code averages over sequences, which differs by a factor).
    H is symmetric, so only the diagonal panels and those on their right are computed. The rest is their mirror image,
    written when `value` is first read: several linears read one Hessian.
    """

    cached = True

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self._mirrored = False

    def update(self, inputs: Tensor, reference: Tensor) -> None:
        rows = self._rows(inputs)
        for start in range(0, self.in_features, _PANEL):
            stop = min(start + _PANEL, self.in_features)
            self.total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
        self._mirrored = False

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        super().restore(state, device)
        self._mirrored = False

    @property
    def value(self) -> Tensor:
        if not self._mirrored:
            self.total = self.total.triu() + self.total.triu(1).T
            self._mirrored = True
        return super().value


class Drift(_Moment):
    """D = 2/T sum (r - x) x^T over all T tokens, `value` (K, K): how far inputs x are from those of the float model, r.

    2/T sum r x^T is the Hessian plus D. Zhang et al. 2025, arXiv 2505.11695 (Qronos), and Li et al. 2025, arXiv
    2504.02692 (GPTAQ), whose deltaXX^T is D without the factor.
    """

    compares = True

    def update(self, inputs: Tensor, reference: Tensor) -> None:
        rows = self._rows(inputs)
        self.total.addmm_((reference.to(rows.dtype) - rows).T, rows)


class Sample(Stat):
    """A sample of the inputs, (S, K), to measure output errors: up to `rows` evenly spaced tokens of each batch."""

    cached = True
    rows: ClassVar[int] = 16

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.inputs = torch.zeros(0, in_features)

    def update(self, inputs: Tensor, reference: Tensor) -> None:
        step = max(1, len(inputs) // self.rows)
        picked = inputs[step // 2 :: step][: self.rows]
        self.inputs = torch.cat([self.inputs.to(picked), picked])

    def rescale(self, scale: Tensor) -> None:
        self.inputs = (self.inputs.to(scale.device) / scale).to(self.inputs.dtype)
