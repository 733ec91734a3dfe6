"""Learned rounding of one weight: shifts before rounding and factors of the ranges, trained by the signs of gradients.

For a value w of a group with the range [low, high], a shift V, and range factors alpha and beta:

    s, z = the format's parameters of the range [beta low, alpha high]
    w' = s (clip(round(w / s + V + z)) - z), the format's rounding of w + s V

With gradients that pass rounding unchanged (straight-through), and m = 0 where w + s V is clipped, else 1:

    dw'/dV = s m        dw'/ds = (w' - m w) / s        dw'/dz = s (m - 1)

Cheng et al. 2023, arXiv 2309.05516, equations 3 to 6.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from harness.core.formats.floating import factor_of
from harness.core.formats.floating_weight import FloatWeight
from harness.core.formats.format import compute_dtype
from harness.core.formats.integer import IntFormat
from harness.core.formats.integer_weight import IntWeight
from harness.core.formats.params import Params
from harness.core.formats.qtensor import QTensor

_NARROWEST = 0.1  # smallest factor of a range
_BEYOND = 2.0**20  # steps, more than a range has

State = tuple[Tensor, Tensor, Tensor]


class Rounding:
    """The rounding of a weight (N, K) to a format under training; it starts as rounding to nearest."""

    def __init__(
        self,
        weight: Tensor,
        fmt: IntWeight | FloatWeight,
        silent: Tensor | None = None,
        ends: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """`silent` (K,) masks inputs that were zero on all calibration tokens: ranges go on to cover their weights.

        `ends` (N, G) are those of the ranges to start with; None: those of the groups.
        """
        self.fmt, self.dtype = fmt, weight.dtype
        self._shape = weight.shape[0], weight.shape[1]
        self._exact = weight.to(compute_dtype(weight))
        self._whole = fmt.whole(self._exact)
        self._groups = fmt.to_groups(self._exact)
        self._low, self._high = self._groups.amin(-1), self._groups.amax(-1)
        self._shift = torch.zeros_like(self._groups)
        kept = fmt.to_groups(self._exact.masked_fill(self._heard(silent), 0))
        self._least = _share(kept.amin(-1), self._low), _share(kept.amax(-1), self._high)
        low, high = ends or (self._low, self._high)
        self._beta = torch.maximum(_share(low, self._low), self._least[0])
        self._alpha = torch.maximum(_share(high, self._high), self._least[1])

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The rounded weight (N, K)."""
        rounded = torch.empty_like(self._groups, dtype=dtype)
        for part, params in self._parts():
            shifted = self._shifted(part, params)
            rounded[part] = self.fmt.snap(shifted, params, out=shifted)
        return self.fmt.from_groups(rounded, self._shape)

    def step(self, gradient: Tensor, lr: float) -> None:
        """Move V, alpha and beta by `lr` against the signs of their gradients.

        `gradient` (N, K) is that of the rounded weight.
        """
        gradients = self.fmt.to_groups(gradient)
        by_range = []
        for part, params in self._parts():
            G, s = gradients[part].to(self._groups.dtype), factor_of(params)
            shifted = self._shifted(part, params)
            clipped = self._clipped(shifted, params)
            rounded = self.fmt.snap(shifted, params, out=shifted)
            d_scale = (rounded.sub_(self._groups[part].masked_fill(clipped, 0)).mul_(G)).sum(-1) / s[..., 0]
            d_zero = -(G * clipped).sum(-1) * s[..., 0]
            by_range.append((d_scale, d_zero))
            self._shift[part].sub_(G.sign().masked_fill_(clipped, 0), alpha=lr).clamp_(-0.5, 0.5)
        d_scale, d_zero = (torch.cat(parts) for parts in zip(*by_range, strict=True))
        d_low, d_high = self._ends(d_scale, d_zero)
        slopes = d_low * self._low, d_high * self._high
        for factor, slope, least in zip((self._beta, self._alpha), slopes, self._least, strict=True):
            factor.sub_(slope.sign(), alpha=lr).clamp_(max=1)
            torch.maximum(factor, least, out=factor)

    def state(self) -> State:
        """What is trained, for `restore`."""
        return self._shift.clone(), self._beta.clone(), self._alpha.clone()

    def restore(self, state: State) -> None:
        """Return to an earlier state."""
        self._shift, self._beta, self._alpha = state

    def quantized(self) -> QTensor:
        """The weight in its present rounding."""
        params = self._params()
        self.fmt.check_scales(self._exact, params)
        shifted = torch.cat([self._shifted(part, each) for part, each in self._parts()])
        return self.fmt.quantized(self.fmt.from_groups(shifted, self._shape), params)

    def _heard(self, silent: Tensor | None) -> Tensor:
        """The inputs (1, K) that are not silent."""
        if silent is None:
            return torch.ones(1, self._shape[1], dtype=torch.bool, device=self._exact.device)
        return ~silent.to(self._exact.device)[None]

    def _params(self) -> Params:
        return self.fmt.cover(self._low * self._beta, self._high * self._alpha, self._whole)

    def _parts(self) -> Iterator[tuple[slice, Params]]:
        """A few rows of groups after another, and their present parameters."""
        return self._params().slabs(self._groups)

    def _shifted(self, part: slice, params: Params) -> Tensor:
        return torch.addcmul(self._groups[part], self._shift[part], factor_of(params))

    def _clipped(self, shifted: Tensor, params: Params) -> Tensor:
        """Where values would be rounded to steps outside of the range of the codes."""
        steps = factor_of(params)
        lowest, highest = (self.fmt.snap(sign * _BEYOND * steps, params) + sign / 2 * steps for sign in (-1.0, 1.0))
        return (shifted < lowest) | (shifted >= highest)  # half a step above is rounded up

    def _ends(self, d_scale: Tensor, d_zero: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the ends of the ranges, up to a positive factor, from those of scale and zero point."""
        low, high = self._low * self._beta, self._high * self._alpha
        if not isinstance(self.fmt, IntFormat) or self.fmt.symmetric:  # s grows with the larger end
            return torch.where(-low > high, -d_scale, 0), torch.where(-low > high, 0, d_scale)
        s = self._params().scale
        d_scale = d_scale + d_zero * low / s.square()  # z = -low / s
        return -d_scale / self.fmt.max_code - d_zero / s, d_scale / self.fmt.max_code


def _share(values: Tensor, end: Tensor) -> Tensor:
    """The factor of the end of a range that still covers `values`; 1 for an end of 0."""
    return torch.where(end == 0, 1, values / torch.where(end == 0, 1, end)).clamp(_NARROWEST, 1)
