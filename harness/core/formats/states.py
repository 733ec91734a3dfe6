"""Keys or values of one layer in a cache: packed codes with their scales, and the newest tokens as floats.

The range of a group is its minimum and maximum. With a float zero point, a group of nearly equal values gets a scale of
at least 2^-15 of its largest magnitude, so that float16 can hold the zero point; this is far below the rounding error
of the zero point itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core.formats import grid
from harness.core.formats.kv import StatesFormat
from harness.core.formats.packing import pack, unpack

_LEAST_STEP = 2.0**-15
# Where scales are below the range of their dtype, the squared rounding error may grow by this factor, one bit. Weights
# are refused sooner; but one call may hold a single token, whose values are small relative to those of other tokens.
_MOST_GROWTH = 4.0


class States:
    """States (B, H, T, D) of the same B sequences and H heads, appended along T; `tensors` lists all their memory.

    Token t is quantized when the group that contains it is complete and lies before the newest `residual` tokens.
    The stored tensors therefore depend on the tokens only, not on how many tokens each call appended.
    """

    def __init__(self, fmt: StatesFormat, residual: int = 0) -> None:
        self.fmt, self.residual = fmt, residual
        self._coded: tuple[Tensor, ...] = ()  # packed codes (B, H, T', bytes), then scale and zero point per group
        self._recent: Tensor | None = None

    def __len__(self) -> int:
        coded = self._coded[0].shape[2] if self._coded else 0
        return coded + (0 if self._recent is None else self._recent.shape[2])

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors in memory."""
        return [*self._coded, *([] if self._recent is None else [self._recent])]

    def append(self, states: Tensor) -> Tensor:
        """Append new tokens (B, H, T, D).

        Every call decodes all tokens, because storing decoded tokens would keep a float cache in addition to the codes.
        Returns: all tokens so far, decoded from the stored tensors, in the dtype of `states`.
        Raises: ValueError if the format does not fit the head size, or a scale is beyond the range of its dtype.
        """
        self.fmt.channels(states.shape[-1])
        recent = states if self._recent is None else torch.cat([self._recent, states], 2)
        full = max(0, recent.shape[2] - self.residual) // self.fmt.tokens * self.fmt.tokens
        if full:
            new = self._encode(recent[:, :, :full])
            old = self._coded
            self._coded = tuple(torch.cat(pair, 2) for pair in zip(old, new, strict=True)) if old else new
        self._recent = recent[:, :, full:].clone()  # a view would keep the quantized tokens in memory
        return torch.cat([self._decode(states.shape[-1]).to(states.dtype), self._recent], 2) if self._coded else recent

    def _encode(self, states: Tensor) -> tuple[Tensor, ...]:
        """Packed codes, scale and, in an asymmetric format, zero point of complete groups."""
        values = states.to(grid.compute_dtype(states))
        axis, groups = self._groups(values)
        low, high = groups.amin(axis), groups.amax(axis)
        if self.fmt.zero_point == "float":
            high = torch.maximum(high, low + torch.maximum(low.abs(), high.abs()) * _LEAST_STEP * self.fmt.max_code)
        scale, zero_point = grid.stored_params(low, high, self.fmt)
        if grid.below_range(scale, self.fmt):
            grid.check_ranges(low, high, self.fmt, _MOST_GROWTH)
        codes = grid.encode(groups, scale.unsqueeze(axis), zero_point.unsqueeze(axis), self.fmt)
        packed = pack(codes, self.fmt.bits).view(*states.shape[:3], -1)
        dtype = getattr(torch, self.fmt.scale_dtype)
        if self.fmt.symmetric:
            return packed, scale.to(dtype)
        return packed, scale.to(dtype), zero_point.to(dtype if self.fmt.zero_point == "float" else torch.uint8)

    def _decode(self, head_dim: int) -> Tensor:
        """All quantized tokens (B, H, T', D), decoded in float32."""
        packed, scale, *zero_points = self._coded
        codes = unpack(packed.view(-1), self.fmt.bits, (*packed.shape[:3], head_dim))
        axis, groups = self._groups(codes)
        scale = scale.to(torch.float32)
        zero_point = zero_points[0].to(scale.dtype) if zero_points else torch.full_like(scale, self.fmt.mid_code)
        return grid.decode(groups, scale.unsqueeze(axis), zero_point.unsqueeze(axis)).view(codes.shape)

    def _groups(self, states: Tensor) -> tuple[int, Tensor]:
        """Split the axis along which values share a scale off states (B, H, T, D). Returns: that axis, and the view."""
        if self.fmt.granularity == "token":
            return 4, states.unflatten(3, (-1, self.fmt.channels(states.shape[3])))
        return 3, states.unflatten(2, (-1, self.fmt.tokens))
