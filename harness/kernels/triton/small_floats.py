"""Weight-only small floats (FP8, MXFP8, MXFP6, MXFP4, NVFP4): what the kernels support, and how a weight is packed.

An element of more than 4 bits takes a byte in a tile: a weight with 6 bits is a third larger than it is stored. Scales
keep their dtype; those of blocks are repeated for each row. The scale of a whole tensor (NVFP4) multiplies sums, so
that 16 bits hold the product of an element with the scale of its group exactly: E2M1 and E4M3 have 6 bits of mantissa
together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core import FloatQTensor
from harness.core.formats import Params
from harness.core.formats.elements import Element
from harness.kernels.triton import tiles
from harness.kernels.triton.case import Case
from harness.kernels.triton.tiles import Layout, Packed
from harness.kernels.triton.tune import Config
from harness.kernels.triton.weight_only import DTYPES, WeightOnly, cases_of, element_of, width

_FLOAT16 = torch.finfo(torch.float16)
_STEP = 16  # inputs of one tensor-core instruction


def supports(weight: FloatQTensor, dtype: torch.dtype) -> bool:
    """Whether `TritonFloat` can run this weight with activations of `dtype`.

    Elements must be float16 numbers, and groups a multiple of 16 inputs, or whole rows. Inputs in float16 need scales
    of groups that float16 holds.
    """
    size, columns = _group_size(weight), weight.shape[1]
    fits = size == columns or (columns % size == 0 and size % _STEP == 0)
    known = type(weight) is FloatQTensor and weight.fmt.kind.largest <= _FLOAT16.max and dtype in DTYPES and fits
    return known and (dtype != torch.float16 or size == columns or _in_float16(weight))


def _group_size(weight: FloatQTensor) -> int:
    """Inputs of a row that share a scale."""
    return weight.shape[1] if weight.scale.shape[1] == 1 else weight.fmt.span(weight.shape[1])


def _in_float16(weight: FloatQTensor) -> bool:
    """Whether scales of groups lose nothing in float16 that the weights would not lose in it.

    A power of two is exact also where it is subnormal; a group whose weights are all 0 in float16 may have any scale.
    """
    scale, powers = weight.scale.float(), weight.fmt.scale_dtype == "e8m0"
    smallest, largest = 2.0**-24 if powers else _FLOAT16.tiny, weight.fmt.kind.largest
    dead = scale * largest < 2.0**-25
    return bool(((scale >= smallest) | dead).all() and (scale * largest <= _FLOAT16.max).all())


class TritonFloat(WeightOnly):
    """A weight of small floats, for Triton's matmul with fp16 or bf16 inputs."""

    def __init__(self, weight: FloatQTensor, dtype: torch.dtype) -> None:
        """Pack `weight` for activations of `dtype`.

        Raises: ValueError if `supports` returns False.
        """
        if not supports(weight, dtype):
            raise ValueError(
                f"element={weight.fmt.element} in groups of {_group_size(weight)} with {dtype} activations has no "
                "Triton kernel; expected float16 or bfloat16, whole rows or groups of a multiple of 16 inputs that "
                "divide a row, and, with float16, scales of groups that it holds"
            )
        kind = weight.fmt.kind
        layout = Layout(*weight.shape, bits=width(kind.name), group_size=_group_size(weight))
        codes = tiles.pack_codes(widened(weight.codes, kind), layout)
        packed = Packed(
            codes, tiles.pack_params(_scale_of_rows(weight), layout), None, layout, kind, weight.tensor_scale
        )
        super().__init__(kind.name, packed, dtype)


def widened(codes: Tensor, kind: Element) -> Tensor:
    """Codes (N, K) uint8 with the sign in the first bit of a tile's width; the magnitude stays in the last bits."""
    sign = 1 << kind.bits - 1
    return codes & sign - 1 | (codes & sign) << width(kind.name) - kind.bits


def _scale_of_rows(weight: FloatQTensor) -> Tensor:
    """The scale (N, G) of each row, in its dtype."""
    rows = torch.arange(weight.shape[0], device=weight.scale.device)
    return weight.fmt.by_row(Params(weight.scale), rows).scale


def cases() -> list[Case]:
    """Variants to inspect: both widths, every kind of scale, few and many rows, and the dequantize kernel."""
    few = Config(64, 16, 2, num_warps=4, num_stages=5, path="split")
    many = Config(128, 128, 1, num_warps=8, num_stages=3, path="tensor")
    dequantize, bfloat16 = Config(num_stages=2, path="dequantize"), DTYPES[1:]
    nvfp4 = _empty("e2m1", 16, torch.float8_e4m3fn)
    return [
        *cases_of("e2m1", _empty("e2m1", 32, torch.float8_e8m0fnu), DTYPES, (few, many)),
        *cases_of("e2m1", nvfp4, DTYPES, (few, many)),
        *cases_of("e2m1", nvfp4, bfloat16, (dequantize,)),
        *cases_of("e4m3", _empty("e4m3", 4096, torch.float32), bfloat16, (few, many, dequantize)),
        *cases_of("e4m3", _empty("e4m3", 128, torch.float32), bfloat16, (few, many)),
        *cases_of("e2m3", _empty("e2m3", 32, torch.float8_e8m0fnu), bfloat16, (many,)),
    ]


def _empty(codes: str, group_size: int, scale_dtype: torch.dtype) -> Packed:
    """A weight without values; scales in E4M3 are those of NVFP4, which has a scale of the whole tensor."""
    whole = torch.empty(0) if scale_dtype == torch.float8_e4m3fn else None
    packed, scale = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=scale_dtype)
    return Packed(packed, scale, None, Layout(4096, 4096, width(codes), group_size), element_of(codes), whole)
