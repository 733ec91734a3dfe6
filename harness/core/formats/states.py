"""Keys or values of one layer in a cache: packed codes with their scales, and the newest tokens as floats."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core import hadamard
from harness.core.formats.format import compute_dtype
from harness.core.formats.packing import pack, unpack
from harness.core.formats.states_format import StatesFormat


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
        """Packed codes of complete groups, and the stored parameters."""
        dtype = compute_dtype(states)
        if self.fmt.rotated:  # in float64, because the rounding of a product in float32 depends on the number of rows
            states = hadamard.rotate(states.double())
        axis, groups = self._groups(states.to(dtype))
        codes, *stored = self.fmt.coded(groups, axis)
        return pack(codes, self.fmt.bits).view(*states.shape[:3], -1), *stored

    def _decode(self, head_dim: int) -> Tensor:
        """All quantized tokens (B, H, T', D), decoded in float32."""
        packed, *stored = self._coded
        codes = unpack(packed.view(-1), self.fmt.bits, (*packed.shape[:3], head_dim))
        axis, groups = self._groups(codes)
        params = self.fmt.restored(*stored).map(lambda tensor: tensor.unsqueeze(axis))
        states = self.fmt.decode(groups, params).view(codes.shape)
        return hadamard.unrotate(states) if self.fmt.rotated else states

    def _groups(self, states: Tensor) -> tuple[int, Tensor]:
        """Split the axis along which values share a scale off states (B, H, T, D). Returns: that axis, and the view."""
        if self.fmt.granularity == "token":
            return 4, states.unflatten(3, (-1, self.fmt.channels(states.shape[3])))
        return 3, states.unflatten(2, (-1, self.fmt.tokens))
