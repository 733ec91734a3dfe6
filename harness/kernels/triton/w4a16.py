"""Weight-only int4 and int8: what the kernels support, how a weight is packed, and the cases for inspection."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core import IntQTensor
from harness.kernels.triton import tiles
from harness.kernels.triton.case import Case
from harness.kernels.triton.tiles import Layout, Packed
from harness.kernels.triton.tune import Config
from harness.kernels.triton.weight_only import DTYPES, WeightOnly, cases_of


def supports(weight: IntQTensor, dtype: torch.dtype) -> bool:
    """Whether `TritonInt` can run this weight with activations of `dtype`."""
    group_size = _group_size(weight)
    fits = group_size == weight.shape[1] or group_size % 16 == 0
    known = type(weight) is IntQTensor and weight.fmt.bits in (4, 8) and dtype in DTYPES and fits
    return known and (dtype != torch.float16 or _in_float16(weight.scale))


def _in_float16(scale: Tensor) -> bool:
    """Whether float16 can hold the scales, as the kernel does for inputs in float16: always if they are stored so."""
    if scale.dtype == torch.float16:
        return True
    low, high = scale.aminmax()
    limits = torch.finfo(torch.float16)
    return bool(low >= limits.tiny and high <= limits.max)


def _group_size(weight: IntQTensor) -> int:
    return weight.shape[1] // weight.scale.shape[1]


class TritonInt(WeightOnly):
    """A weight of int4 or int8 codes, for Triton's matmul with fp16 or bf16 inputs."""

    def __init__(self, weight: IntQTensor, dtype: torch.dtype) -> None:
        """Pack `weight` for activations of `dtype`.

        Raises: ValueError if `supports` returns False.
        """
        if not supports(weight, dtype):
            raise ValueError(
                f"bits={weight.fmt.bits} in groups of {_group_size(weight)} with {dtype} activations has no Triton "
                "kernel; expected 4 or 8 bits, groups of a multiple of 16 inputs or whole rows, and float16 or bfloat16"
            )
        layout = Layout(*weight.shape, bits=weight.fmt.bits, group_size=_group_size(weight))
        codes, scale = tiles.pack_codes(weight.codes, layout), tiles.pack_params(weight.scale, layout)
        packed = Packed(codes, scale, _pack_zero_point(weight, layout), layout)
        super().__init__(f"int{weight.fmt.bits}", packed, dtype)


def _pack_zero_point(weight: IntQTensor, layout: Layout) -> Tensor | None:
    if weight.zero_point is None:
        return None
    if weight.fmt.zero_point == "float":
        return tiles.pack_params(weight.zero_point, layout)
    return tiles.pack_zero_points(weight.zero_points().to(torch.uint8), layout)


def cases() -> list[Case]:
    """Variants to inspect: few and many rows, both dtypes, several group sizes, and the dequantize kernel."""
    few = Config(64, 16, 2, num_warps=4, num_stages=5, path="split")
    middle = Config(64, 64, 1, num_warps=4, num_stages=4, path="tensor")
    many = Config(128, 128, 1, num_warps=8, num_stages=3, path="tensor")
    dequantize = Config(num_stages=2, path="dequantize")
    matmuls = [
        case for size in (128, 64, 32) for case in cases_of("int4", _empty(4, size), DTYPES, (few, middle, many))
    ]
    rows = cases_of("int8", _empty(8, 4096), DTYPES[1:], (few, many))
    return [*matmuls, *rows, *cases_of("int4", _empty(4, 128), DTYPES, (dequantize,))]


def _empty(bits: int, group_size: int) -> Packed:
    codes, scale = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.float16)
    return Packed(codes, scale, codes, Layout(4096, 4096, bits, group_size))
