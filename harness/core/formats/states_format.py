"""Formats of keys, or of values, in a cache: which states share a scale, and how scales are stored."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from harness.core.formats import scales
from harness.core.formats.floating import FloatFormat
from harness.core.formats.format import Format
from harness.core.formats.integer import StoredInt
from harness.core.formats.levels import LevelsFormat, chosen
from harness.core.formats.params import Params
from harness.core.formats.scales import ScaleDtype
from harness.core.options import CHANGED

# A group of nearly equal values gets a scale of at least this share of its largest magnitude, so that float16 can hold
# a float zero point; this is far below the rounding error of the zero point itself.
_LEAST_STEP = 2.0**-15
# Where scales are below the range of their dtype, the squared rounding error may grow by this factor, one bit. Weights
# are refused sooner; but one call may hold a single token, whose values are small relative to those of other tokens.
_MOST_GROWTH = 4.0


@dataclass(frozen=True, kw_only=True)
class StatesFormat(Format):
    """Format of keys, or of values, (B, heads, T, head_dim).

    granularity  token: `group_size` neighbouring channels of one token share a scale, -1 is the whole head;
                 channel: `group_size` consecutive tokens of one channel share a scale
    rotated      whether each head's vector is multiplied by an orthogonal Hadamard matrix before it is encoded, and
                 back after it is decoded, so that a channel that is large in every token spreads over all channels
    """

    granularity: Literal["token", "channel"]
    group_size: int = 32
    rotated: bool = field(default=False, metadata=CHANGED)
    where: ClassVar[str] = "kv.{key,value}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1 and not (self.group_size == -1 and self.granularity == "token"):
            raise ValueError(
                f"group_size={self.group_size} is out of range with granularity={self.granularity}; expected a "
                "positive number, or -1 with granularity=token"
            )

    @property
    def tokens(self) -> int:
        """Number of tokens that are quantized together."""
        return self.group_size if self.granularity == "channel" else 1

    def channels(self, head_dim: int) -> int:
        """Number of channels of one token that share a scale.

        Raises: ValueError if `group_size` does not divide `head_dim`, or a token's codes do not fill whole bytes.
        """
        size = head_dim if self.group_size == -1 else self.group_size
        if self.granularity == "token" and head_dim % size:
            raise ValueError(
                f"{self.where}.group_size={size} does not divide head_dim={head_dim}; use a divisor, or -1"
            )
        if head_dim * self.bits % 8:
            raise ValueError(
                f"{self.where}.bits={self.bits} does not fill whole bytes with head_dim={head_dim}; use 8 bits, or 4"
            )
        return size if self.granularity == "token" else 1

    @abstractmethod
    def coded(self, groups: Tensor, axis: int) -> tuple[Tensor, ...]:
        """Codes of `groups`, uint8 in the same shape, and their parameters in the dtypes in which they are stored.

        Values along `axis` share parameters, which lack this axis.
        Raises: ValueError if a scale is beyond the range of its dtype.
        """

    @abstractmethod
    def restored(self, *stored: Tensor) -> Params:
        """The parameters in float32 from the tensors that `coded` returned after the codes."""


class RangedStates(StatesFormat):
    """A format in which the range of a group decides its parameters."""

    def coded(self, groups: Tensor, axis: int) -> tuple[Tensor, ...]:
        stored = self.stored(groups.amin(axis), groups.amax(axis))
        params = self.restored(*stored).map(lambda tensor: tensor.unsqueeze(axis))
        return self.encode(groups, params), *stored

    @abstractmethod
    def stored(self, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        """The parameters of groups with the ranges [low, high], in the dtypes in which they are stored.

        Raises: ValueError if a scale is beyond the range of its dtype.
        """


@dataclass(frozen=True, kw_only=True)
class IntStates(RangedStates, StoredInt):
    """Integer codes of keys or values.

    zero_point  an integer zero point takes one byte, a float one is stored as `scale_dtype`
    """

    zero_point: Literal["integer", "float"] = "float"

    def stored(self, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        if self.zero_point == "float":
            high = torch.maximum(high, low + torch.maximum(low.abs(), high.abs()) * _LEAST_STEP * self.max_code)
        params = self.cover(low, high)
        if scales.below_range(params.scale, self.scale_dtype):
            scales.check(self.exact_scale(low, high), self.scale_dtype, self.where, _MOST_GROWTH)
        dtype = getattr(torch, self.scale_dtype)
        if params.zero_point is None:
            return (params.scale.to(dtype),)
        return params.scale.to(dtype), params.zero_point.to(dtype if self.zero_point == "float" else torch.uint8)

    def restored(self, *stored: Tensor) -> Params:
        return Params(*(tensor.float() for tensor in stored))


@dataclass(frozen=True, kw_only=True)
class FloatStates(RangedStates, FloatFormat):
    """Small floats of keys or values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tensor_scale or self.scale_search != "none":
            raise ValueError(
                f"tensor_scale={str(self.tensor_scale).lower()} and scale_search={self.scale_search}: a cache grows "
                "token by token; expected tensor_scale=false and scale_search=none"
            )

    def stored(self, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        scale = self.cover(low, high).scale.float().to(self.scale_storage)
        return (scale.view(torch.uint8) if scale.itemsize == 1 else scale,)  # torch joins no tensors of 8-bit floats

    def restored(self, *stored: Tensor) -> Params:
        return Params(stored[0].view(self.scale_storage).float())


@dataclass(frozen=True, kw_only=True)
class LevelsStates(StatesFormat, LevelsFormat):
    """The levels with the least squared error for normal values, whose variance is that of the group.

    For a group x of n values, each code is that of the level nearest to x / r with r = |x| / sqrt(n). The stored scale
    is |x| / |levels of the codes|, so that the decoded group has the norm of x, up to the rounding of the scale.
    """

    table: Literal["lloyd_max"]
    scale_dtype: ScaleDtype = "float16"

    def coded(self, groups: Tensor, axis: int) -> tuple[Tensor, ...]:
        norm = _norm(groups, axis)
        rms = (norm / groups.shape[axis] ** 0.5).to(groups.dtype)
        codes = self.encode(groups, Params(rms.unsqueeze(axis)))
        exact = (norm / _norm(chosen(self.levels.to(groups), codes), axis)).to(groups.dtype)
        stored = scales.store(exact, self.scale_dtype, self.where)
        if scales.below_range(stored, self.scale_dtype):
            scales.check(exact, self.scale_dtype, self.where, _MOST_GROWTH)
        return codes, stored.where(exact > 0, 0).to(getattr(torch, self.scale_dtype))

    def restored(self, *stored: Tensor) -> Params:
        return Params(stored[0].float())


def _norm(values: Tensor, axis: int) -> Tensor:
    """Euclidean norms along `axis` in float64, which holds the squares of all float32 values."""
    norm: Tensor = torch.linalg.vector_norm(values, dim=axis, dtype=torch.float64)
    return norm
