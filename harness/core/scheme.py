"""Numeric formats: the number of bits, the grid, and which values share a scale. Numbers only, no algorithm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

Granularity = Literal["tensor", "channel", "group"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]
NATIVE = "native"  # name of the scheme of methods that define their format themselves
SCALE_BITS: dict[ScaleDtype, int] = {"float16": 16, "bfloat16": 16, "float32": 32}


@dataclass(frozen=True, kw_only=True)
class IntFormat:
    """Integer codes 0 .. 2^bits - 1 on a uniform grid: value = (code - zero_point) * scale.

    `grid` and `zero_point` decide how scale and zero point are computed from the range of values; see
    `harness.core.formats.grid`. Only symmetric formats use `grid`, only asymmetric formats use `zero_point`.
    """

    bits: int
    symmetric: bool = False
    grid: Literal["full", "narrow"] = "full"
    zero_point: Literal["integer", "float"] = "integer"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} is out of range; expected 2 to 8")
        if self.grid != "full" and not self.symmetric:
            raise ValueError(f"grid={self.grid} has no use with symmetric=false; set symmetric=true, or grid=full")
        if self.zero_point != "integer" and self.symmetric:
            raise ValueError(f"zero_point={self.zero_point} has no use with symmetric=true; set symmetric=false")

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def mid_code(self) -> int:
        """The fixed zero point of a symmetric format."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True, kw_only=True)
class StoredFormat(IntFormat):
    """Codes with scales that are stored as `scale_dtype`; `where` is the configuration key in error messages."""

    scale_dtype: ScaleDtype = "float16"
    where: ClassVar[str] = "scheme.weight"


@dataclass(frozen=True, kw_only=True)
class WeightFormat(StoredFormat):
    """Format of one weight (N out, K in).

    `group_size` consecutive inputs of one output row share a scale, -1 is the whole row; only granularity
    `group` uses it. Scales are stored as `scale_dtype`, integer zero points in `bits` bits.
    """

    granularity: Granularity = "channel"
    group_size: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} is out of range; expected a positive number, or -1")
        if self.granularity != "group" and self.group_size != -1:
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
        size = in_features if self.group_size == -1 else self.group_size
        if in_features % size:
            raise ValueError(
                f"scheme.weight.group_size={size} does not divide in_features={in_features}; use a divisor, or -1"
            )
        return out_features, in_features // size

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Analytic size: code, scale and zero point bits of a weight (N, K), divided by N K."""
        rows, columns = self.groups(shape)
        per_group = SCALE_BITS[self.scale_dtype]
        if not self.symmetric:
            per_group += self.bits if self.zero_point == "integer" else SCALE_BITS[self.scale_dtype]
        return self.bits + rows * columns * per_group / (shape[0] * shape[1])


@dataclass(frozen=True, kw_only=True)
class ActivationFormat(IntFormat):
    """Format of a linear's input: one scale per token or per sequence, computed at run time (`dynamic`) or calibrated.

    With granularity `tensor` and `dynamic`, all tokens of a sequence share one scale. The sequences of a batch
    never share a scale, so that a result does not depend on the batch size. With `threshold`, a channel in which
    any token of the sequence reaches the threshold in magnitude stays float and does not count for the ranges of
    the other channels (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339, equation 8). Ranges, dynamic or
    calibrated, are multiplied by `clip`: larger values are clipped to the end of the grid, and all other values
    get finer steps.
    """

    granularity: Literal["token", "tensor"] = "token"
    dynamic: bool = True
    threshold: float | None = None
    clip: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip={self.clip} is out of range; expected a share of the range above 0, up to 1")
        if self.granularity == "token" and not self.dynamic:
            raise ValueError(
                "dynamic=False has no meaning with granularity=token, whose ranges are known only at run time; "
                "use granularity=tensor, or dynamic=true"
            )
        if self.threshold is not None and not (self.threshold > 0 and self.dynamic):
            raise ValueError(
                f"threshold={self.threshold} with dynamic={self.dynamic} has no meaning; expected a positive threshold "
                "and dynamic=true, or threshold=null"
            )


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A weight format and, if inputs are quantized too, an activation format. `name` labels the scheme in tables."""

    name: str
    weight: WeightFormat
    activation: ActivationFormat | None = None

    def at(self, bits: int) -> Scheme:
        """The same scheme with another number of `bits` for the weights."""
        return replace(self, weight=replace(self.weight, bits=bits))


def require_native(scheme: Scheme, what: str) -> None:
    """Check that `scheme` is `native`, for a method that defines its format itself; `what` names that format.

    Raises: ValueError if it is another scheme.
    """
    if scheme.name != NATIVE:
        raise ValueError(f"scheme={scheme.name} is another format than {what}; use scheme={NATIVE}")
