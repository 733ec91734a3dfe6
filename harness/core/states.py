"""Keys or values of one layer as a cache stores them: packed codes with their scales, and the newest tokens as floats.

A range is that of the group. With a float zero point, groups whose values hardly differ get a range of at least
2^-15 of their largest magnitude a code step, so that float16 can hold the zero point; that is far below the
rounding of the zero point itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core import grid
from harness.core.kv import StatesFormat
from harness.core.packing import pack, unpack

_LEAST_STEP = 2.0**-15


class States:
    """States (B, H, T, D) of the same B sequences and H heads, appended along T, in memory that is all listed.

    Token t is coded once a whole group that holds it lies before the newest `residual` tokens. What is stored
    therefore depends on the tokens alone, not on how many were appended at a time.
    """

    def __init__(self, fmt: StatesFormat, residual: int = 0) -> None:
        self.fmt, self.residual = fmt, residual
        self._coded: tuple[Tensor, ...] = ()  # packed (B, H, T', bytes), then scale and zero point a group
        self._recent: Tensor | None = None

    def __len__(self) -> int:
        coded = self._coded[0].shape[2] if self._coded else 0
        return coded + (0 if self._recent is None else self._recent.shape[2])

    @property
    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [*self._coded, *([] if self._recent is None else [self._recent])]

    def append(self, states: Tensor) -> Tensor:
        """Add new tokens (B, H, T, D); returns all tokens so far as they are stored, decoded, in `states`' dtype.

        All are decoded at every call: to keep decoded ones would be to hold the float cache beside the codes.
        Raises: ValueError if the format does not fit the head's size, or a scale overflows its dtype.
        """
        self.fmt.channels(states.shape[-1])
        recent = states if self._recent is None else torch.cat([self._recent, states], 2)
        full = max(0, recent.shape[2] - self.residual) // self.fmt.tokens * self.fmt.tokens
        if full:
            new = self._encode(recent[:, :, :full])
            old = self._coded
            self._coded = tuple(torch.cat(pair, 2) for pair in zip(old, new, strict=True)) if old else new
        self._recent = recent[:, :, full:].clone()  # of its own, lest a view hold what was coded
        return torch.cat([self._decode(states.shape[-1]).to(states.dtype), self._recent], 2) if self._coded else recent

    def _encode(self, states: Tensor) -> tuple[Tensor, ...]:
        """Packed codes, scale and, of an asymmetric format, zero point of whole groups."""
        values = states.to(grid.compute_dtype(states))
        axis, groups = self._groups(values)
        low, high = groups.amin(axis), groups.amax(axis)
        if self.fmt.zero_point == "float":
            high = torch.maximum(high, low + torch.maximum(low.abs(), high.abs()) * _LEAST_STEP * self.fmt.max_code)
        scale, zero_point = grid.stored_params(low, high, self.fmt)
        codes = grid.encode(groups, scale.unsqueeze(axis), zero_point.unsqueeze(axis), self.fmt)
        packed = pack(codes, self.fmt.bits).view(*states.shape[:3], -1)
        stored = getattr(torch, self.fmt.scale_dtype)
        if self.fmt.symmetric:
            return packed, scale.to(stored)
        return packed, scale.to(stored), zero_point.to(stored if self.fmt.zero_point == "float" else torch.uint8)

    def _decode(self, head_dim: int) -> Tensor:
        """All coded tokens (B, H, T', D), in float32 or wider."""
        packed, scale, *rest = self._coded
        codes = unpack(packed.view(-1), self.fmt.bits, (*packed.shape[:3], head_dim))
        axis, groups = self._groups(codes)
        scale = scale.to(torch.float32)
        zero_point = rest[0].to(scale.dtype) if rest else torch.full_like(scale, self.fmt.mid_code)
        return grid.decode(groups, scale.unsqueeze(axis), zero_point.unsqueeze(axis)).view(codes.shape)

    def _groups(self, states: Tensor) -> tuple[int, Tensor]:
        """States (B, H, T, D) with the axis of what shares a scale split off, and that axis."""
        if self.fmt.granularity == "token":
            return 4, states.unflatten(3, (-1, self.fmt.channels(states.shape[3])))
        return 3, states.unflatten(2, (-1, self.fmt.tokens))
