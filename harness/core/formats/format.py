"""What a number format is: how values that share a scale become codes, and codes become values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core.finite import check_finite
from harness.core.formats.params import Params
from harness.core.options import CHANGED

if TYPE_CHECKING:
    from harness.core.formats.qtensor import QTensor


def compute_dtype(value: Tensor) -> torch.dtype:
    """The dtype of a format's arithmetic on `value`: float64 for float64, otherwise float32."""
    return torch.promote_types(value.dtype, torch.float32)


def padded(values: Tensor, size: int) -> Tensor:
    """`values` (..., K) with zeros up to a multiple of `size`; the same tensor if K is one."""
    missing = -values.shape[-1] % size
    return F.pad(values, (0, missing)) if missing else values


def sequence_axes(values: Tensor, dims: int) -> tuple[int, ...]:
    """The axes of one sequence, which has `dims`; a tensor of more has an axis of the batch before them."""
    return tuple(range(1 if values.dim() > dims else 0, values.dim()))


class Format(ABC):
    """A number format; subclasses are frozen dataclasses, and only they round.

    bits       bits of one code
    symmetric  whether the codes cover ranges around 0 alone, so that there is no zero point to choose
    where      the configuration key of the format in error messages
    """

    where: ClassVar[str] = "scheme.weight"

    if TYPE_CHECKING:  # fields of integer formats, properties of others

        @property
        def bits(self) -> int: ...

        @property
        def symmetric(self) -> bool: ...

    def __post_init__(self) -> None:  # noqa: B027  # ends the calls of subclasses, which check their fields
        """Check the fields. Raises: ValueError for settings that exclude each other."""

    @property
    @abstractmethod
    def label(self) -> str:
        """The codes in a word: int4, e2m1."""

    def cover(self, low: Tensor, high: Tensor, whole: Tensor | None = None) -> Params:
        """The parameters of groups with the ranges [low, high], exact in the dtypes in which they are stored.

        `whole` is the factor of the whole tensor, for a format that has one. A group of zeros decodes to zeros.
        Raises: ValueError if a parameter is too large for its dtype; NotImplementedError for a format whose parameters
        a range does not decide, which overrides `params`.
        """
        raise NotImplementedError(f"{self.label} has no parameters that follow from a range alone")

    @property
    def shrinks(self) -> list[list[tuple[float, float]]]:
        """Factors for the low and the high end of a range with which a search tries other ranges, in stages.

        Each stage starts from the best range of the previous one. Empty: ranges of this format are not searched.
        """
        return []

    def params(self, groups: Tensor, whole: Tensor | None = None) -> Params:
        """The parameters of `groups` (..., size), whose last axis shares a scale, from their ranges."""
        return self.cover(groups.amin(-1), groups.amax(-1), whole)

    def whole(self, values: Tensor) -> Tensor | None:
        """The factor () that all groups of a tensor share; None if the format has none."""
        return None

    @abstractmethod
    def encode(self, values: Tensor, params: Params) -> Tensor:
        """Nearest codes of `values`, uint8; the parameters broadcast against the values."""

    @abstractmethod
    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """The values of `codes`, in the dtype of the scale."""

    @abstractmethod
    def snap(self, values: Tensor, params: Params, out: Tensor | None = None) -> Tensor:
        """Round `values` to the nearest values of the format: `decode(encode(values))` without codes.

        Returns: `out`, if given, with the result.
        """


@dataclass(frozen=True, kw_only=True)
class WeightFormat(Format):
    """Format of one weight (N out, K in).

    granularity  tensor: one scale; channel: one for each output row; group: one for `group_size` consecutive inputs of
                 an output row, -1 is the whole row
    """

    granularity: Literal["tensor", "channel", "group", "block", "flat"] = "channel"
    group_size: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} is out of range; expected a positive number, or -1")
        if self.granularity in ("tensor", "channel") and self.group_size != -1:
            raise ValueError(
                f"group_size={self.group_size} has no use with granularity={self.granularity}; "
                "set granularity=group, or group_size=-1"
            )

    def groups(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of `scale` for a weight of shape (N, K): (1, 1), (N, 1) or (N, G).

        Raises: ValueError if `group_size` does not divide K.
        """
        out_features, in_features = shape
        if self.granularity == "tensor":
            return 1, 1
        size = self.span(in_features)
        if in_features % size:
            raise ValueError(
                f"{self.where}.group_size={size} does not divide in_features={in_features}; use a divisor, or -1"
            )
        return out_features, in_features // size

    def span(self, in_features: int) -> int:
        """Number of consecutive inputs of an output row that share a scale."""
        return in_features if self.group_size == -1 else self.group_size

    def to_groups(self, weight: Tensor) -> Tensor:
        """A weight (N, K) as (rows, G, values), whose last axis shares a scale; rows is 1 for granularity `tensor`."""
        rows, columns = self.groups((weight.shape[0], weight.shape[1]))
        return weight.reshape(rows, columns, -1)

    def from_groups(self, groups: Tensor, shape: tuple[int, int]) -> Tensor:
        """The inverse of `to_groups`, for a weight of `shape`."""
        return groups.view(shape)

    @property
    def height(self) -> int:
        """Number of output rows that share a scale; not for granularity `tensor`."""
        return 1

    def by_row(self, params: Params, rows: Tensor) -> Params:
        """The parameters (n, G) of the n output `rows`, int64."""
        places = rows // self.height
        return params.map(lambda values: values.expand(len(rows), -1) if len(values) == 1 else values[places])

    def weight_params(self, weight: Tensor) -> Params:
        """The parameters (N, G), or (1, 1) per tensor, of a weight (N, K) from its groups' minimum and maximum.

        Raises: ValueError if the weight has a NaN or an infinity, or a parameter is too large for its dtype.
        """
        check_finite(weight)
        values = weight.to(compute_dtype(weight))
        return self.params(self.to_groups(values), self.whole(values))

    def snap_weight(self, weight: Tensor) -> Tensor:
        """Round a weight (N, K) to nearest in the ranges of its groups, as floats; searches call this many times."""
        params = self.weight_params(weight)
        groups = self.snap(self.to_groups(weight.to(params.scale.dtype)), params.spread())
        return self.from_groups(groups, (weight.shape[0], weight.shape[1])).to(weight.dtype)

    def check_scales(self, weight: Tensor, params: Params) -> None:
        """Check that the dtype of the stored scales is wide enough for the small values of a weight (N, K).

        Raises: ValueError if it is not.
        """

    def codes(self, weight: Tensor, params: Params) -> Tensor:
        """Nearest codes (N, K), uint8, of a weight with these parameters."""
        codes = self.encode(self.to_groups(weight.to(params.scale.dtype)), params.spread())
        return self.from_groups(codes, (weight.shape[0], weight.shape[1]))

    @abstractmethod
    def quantized(self, weight: Tensor, params: Params) -> QTensor:
        """Quantize a weight (N, K) with these parameters, each value to the nearest code."""

    @abstractmethod
    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Analytic size: bits of codes and parameters of a weight (N, K) = `shape`, each tensor in whole bytes."""

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Stored bits of a weight (N, K) = `shape`, divided by N K."""
        return self.stored_bits(shape) / (shape[0] * shape[1])

    @abstractmethod
    def at(self, bits: int) -> WeightFormat:
        """The same format with another number of bits.

        Raises: ValueError if its width cannot be chosen.
        """


@dataclass(frozen=True, kw_only=True)
class ActivationFormat(Format):
    """Format of a linear's input (..., T, K): a scale per token, group or sequence, dynamic or calibrated.

    With granularity `group`, `group_size` consecutive channels of a token share a scale, the last of them may be fewer.
    With granularity `tensor` and `dynamic`, all tokens of a sequence share one scale. The sequences of a batch
    never share a scale, so that a result does not depend on the batch size. With `threshold`, a channel in which
    any token of the sequence reaches the threshold in magnitude stays float and does not count for the ranges of
    the other channels (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339, equation 8). Ranges, dynamic or
    calibrated, are multiplied by `clip`: larger values are clipped to the end of the grid, and all other values
    get finer steps.
    """

    where: ClassVar[str] = "scheme.activation"
    granularity: Literal["token", "tensor", "group"] = "token"
    group_size: int = field(default=-1, metadata=CHANGED)
    dynamic: bool = True
    threshold: float | None = None
    clip: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.granularity == "group") != (self.group_size > 0):
            raise ValueError(
                f"group_size={self.group_size} does not fit granularity={self.granularity}; expected a positive number "
                "with granularity=group, otherwise -1"
            )
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip={self.clip} is out of range; expected a share of the range above 0, up to 1")
        if self.granularity != "tensor" and not self.dynamic:
            raise ValueError(
                f"dynamic=False has no meaning with granularity={self.granularity}, whose ranges are known only at run "
                "time; use granularity=tensor, or dynamic=true"
            )
        if self.threshold is not None and not (self.threshold > 0 and self.dynamic):
            raise ValueError(
                f"threshold={self.threshold} with dynamic={self.dynamic} has no meaning; expected a positive threshold "
                "and dynamic=true, or threshold=null"
            )

    def to_groups(self, values: Tensor) -> Tensor:
        """`values` (..., T, K) in a shape of which whole axes share a scale."""
        if self.granularity != "group":
            return values
        return padded(values, self.group_size).view(*values.shape[:-1], -1, self.group_size)

    def from_groups(self, groups: Tensor, channels: int) -> Tensor:
        """The inverse of `to_groups`, for values of K = `channels`."""
        return groups.flatten(-2)[..., :channels] if self.granularity == "group" else groups

    def axes(self, groups: Tensor) -> tuple[int, ...]:
        """Axes of `groups` that share a scale: the channels of a token or group, or all axes of a sequence."""
        return sequence_axes(groups, 2) if self.granularity == "tensor" else (-1,)

    def clipped(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The range that the codes cover: the observed range [low, high] times `clip`."""
        return (low, high) if self.clip == 1 else (low * self.clip, high * self.clip)
