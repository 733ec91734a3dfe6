"""Weights that select from a table of levels: the format, and the stored tensors.

Double quantization (Dettmers et al. 2023, arXiv 2305.14314, section 3) subtracts the mean from the scales and stores
them as codes of the signed dynamic map (Dettmers 2015, arXiv 1511.04561, section 3.1), in blocks of 256 with one scale
each. As in the authors' library, codes are chosen under the scales before they are quantized.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from harness.core.formats import scales
from harness.core.formats.format import padded
from harness.core.formats.levels import LevelsFormat, chosen, nearest, shares_of
from harness.core.formats.packing import pack, packed_bytes
from harness.core.formats.params import Params
from harness.core.formats.qtensor import GroupedQTensor, QTensor
from harness.core.formats.scaled_weight import ScaledWeight
from harness.core.formats.tables import dynamic_levels

NESTED_BLOCK = 256  # scales that share one nested scale


@dataclass(frozen=True, kw_only=True)
class LevelsWeight(ScaledWeight, LevelsFormat):
    """Levels of one weight (N out, K in).

    granularity   also flat: `group_size` consecutive values of the flattened weight, which span rows if `group_size`
                  does not divide K; the last may be fewer
    double_quant  store the scales in 8 bits
    """

    granularity: Literal["tensor", "channel", "group", "flat"] = "group"
    double_quant: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity == "flat" and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} with granularity=flat; expected a positive number")
        if self.double_quant and self.scale_dtype != "float32":
            raise ValueError(
                f"double_quant=true has no use with scale_dtype={self.scale_dtype}; set scale_dtype=float32, or "
                "double_quant=false"
            )

    def groups(self, shape: tuple[int, int]) -> tuple[int, int]:
        if self.spans_rows(shape):
            return 1, -(-shape[0] * shape[1] // self.group_size)
        return super().groups(shape)

    def to_groups(self, weight: Tensor) -> Tensor:
        if not self.spans_rows((weight.shape[0], weight.shape[1])):
            return super().to_groups(weight)
        return padded(weight.reshape(-1), self.group_size).view(1, -1, self.group_size)

    def from_groups(self, groups: Tensor, shape: tuple[int, int]) -> Tensor:
        return groups.flatten()[: shape[0] * shape[1]].view(shape)

    def span(self, in_features: int) -> int:
        size = super().span(in_features)
        if self.granularity == "flat" and in_features % size:
            raise ValueError(
                f"{self.where}.group_size={size} does not divide in_features={in_features}, and groups that span rows "
                "are only rounded to nearest; use a divisor, or method=rtn"
            )
        return size

    def quantized(self, weight: Tensor, params: Params) -> LevelsQTensor:
        return LevelsQTensor(self.codes(weight, params), params, self)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        rows, columns = self.groups(shape)
        count, table = rows * columns, 32 << self.bits
        bits = 8 * packed_bytes(shape[0] * shape[1], self.bits) + table
        if not self.double_quant:
            return bits + count * scales.BITS[self.scale_dtype]
        return bits + count * 8 + 32 * (-(-count // NESTED_BLOCK) + 256 + 1)

    def at(self, bits: int) -> LevelsWeight:
        return replace(self, bits=bits)

    def spans_rows(self, shape: tuple[int, int]) -> bool:
        """Whether groups of a weight (N, K) = `shape` span its rows."""
        return self.granularity == "flat" and shape[1] % self.group_size != 0


class LevelsQTensor(GroupedQTensor):
    """Packed codes of levels with a scale for each group.

    levels         (2^bits,) float32, by code
    scale          (N, G), (1, 1) per tensor, or (1, G) if groups span rows: in the dtype of the format, or uint8 codes
                   under double quantization
    nested_scale   (N G / 256,) float32 scales of these uint8 codes; this and the next two are None otherwise
    nested_levels  (256,) float32 levels of these codes
    offset         () float32 mean of the scales
    """

    fmt: LevelsWeight
    levels: Tensor
    scale: Tensor
    nested_scale: Tensor | None
    nested_levels: Tensor | None
    offset: Tensor | None

    def __init__(self, codes: Tensor, params: Params, fmt: LevelsWeight) -> None:
        """Store `codes` (N, K) uint8 with parameters of shape `fmt.groups((N, K))`."""
        super().__init__((codes.shape[0], codes.shape[1]), fmt)
        scale, nested, book, offset = params.scale.to(getattr(torch, fmt.scale_dtype)), None, None, None
        if fmt.double_quant:
            offset, book = scale.mean(), dynamic_levels().to(scale.device)
            nested_codes, nested = encode_blocks((scale - offset).flatten(), book)
            scale = nested_codes.view(scale.shape)
        self.register_buffer("qweight", pack(codes, fmt.bits))
        self.register_buffer("levels", fmt.levels.to(codes.device))
        self.register_buffer("scale", scale)
        self.register_buffer("nested_scale", nested)
        self.register_buffer("nested_levels", book)
        self.register_buffer("offset", offset)

    def scales(self) -> Tensor:
        """The scales of the groups in float32, decoded from the stored bits."""
        if self.nested_levels is None or self.nested_scale is None or self.offset is None:
            return self.scale.float()
        steps = chosen(self.nested_levels, self.scale.flatten())
        factors = self.nested_scale.repeat_interleave(NESTED_BLOCK)[: len(steps)]
        return steps.mul_(factors).add_(self.offset).view(self.scale.shape)

    def params(self) -> Params:
        return Params(self.scales())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if not self.fmt.spans_rows(self.shape):
            return super().dequantize(dtype)
        groups = self.fmt.decode(self.fmt.to_groups(self.codes), self.params().spread())
        return self.fmt.from_groups(groups, self.shape).to(dtype)

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        by_rows = not self.fmt.spans_rows(self.shape)
        return super().linear(inputs, bias) if by_rows else QTensor.linear(self, inputs, bias)


def encode_blocks(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8 of flat `values` (n,) float32 in blocks of 256, and the largest magnitude of each block."""
    blocks = padded(values, NESTED_BLOCK).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(1)
    return nearest(shares_of(blocks, absmax[:, None]), levels).view(-1)[: len(values)], absmax
