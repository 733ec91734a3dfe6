"""Checkpoints of HQQ in safetensors, as transformers before version 5 and hqq's `save_to_safetensors` write them.

    W_q          codes in groups of the weight, read row by row: (N K / group_size, group_size) with axis 1, with axis 0
                 (group_size, N K / group_size); a byte or 32 bits hold codes of several rows, the first in high bits
    scale, zero  one for each group, in one dtype: weight = (code - zero) * scale
    nbits, axis, group_size, shape   numbers
    packing      the name of the packing, in characters
    others       how the library found the codes, and how it computes

Source: hqq, core/quantize.py, core/bitpack.py and core/utils.py.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from harness.models.exchange.integers import SCALES, float_zeros
from harness.models.exchange.reader import (
    FileQTensor,
    Reader,
    StoredLinear,
    Tensors,
    bits_of,
    damaged,
    expect,
    unsupported,
)
from harness.models.exchange.words import stacked

# Bits of a code, and what holds several of them.
_PACKINGS = {
    "8bit_u8": (8, torch.uint8),
    "4bit_u8": (4, torch.uint8),
    "3bit_32": (3, torch.int32),
    "2bit_u8": (2, torch.uint8),
    "1bit_u8": (1, torch.uint8),
}
_NUMBERS = (torch.int32, torch.int64, torch.uint8, torch.float32)
_NEEDED = ("scale", "zero", "nbits", "axis", "group_size", "shape", "packing")


class HQQ(Reader):
    """Linears with `W_q`; their settings are tensors too."""

    name = "hqq"
    key = "W_q"
    parts = (
        *("W_q", "unpack_view_dtype", "view_as_float", "compute_dtype", "quant_scale", "quant_zero", "offload_meta"),
        *("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"),
        *_NEEDED,
    )

    def read(self, name: str) -> StoredLinear:
        tensors = self.tensors(name, _NEEDED)
        for part in ("quant_scale", "quant_zero"):
            if part in tensors and _number(name, part, tensors):
                raise unsupported(part, 1, "0, with scales and zeros in floats")
        rows, columns = _shape(name, tensors["shape"])
        size, axis = int(_number(name, "group_size", tensors)), int(_number(name, "axis", tensors))
        if size < 1 or rows * columns % size or axis not in (0, 1):
            raise damaged(f"{name} has group_size={size} and axis={axis} for a weight {rows}x{columns}")
        groups = rows * columns // size
        grouped, each = ((groups, size), (groups, 1)) if axis else ((size, groups), (1, groups))
        scale = expect(name, "scale", tensors["scale"], SCALES, *each)
        zero = expect(name, "zero", tensors["zero"], scale.dtype, *each)
        field, words = _words(name, tensors, grouped)
        bits = math.ceil(_number(name, "nbits", tensors))
        if axis == 1 and columns % size == 0 and bits > 1:
            codes = stacked(words, field, groups, from_high=True).view(rows, columns)
            weight = float_zeros(name, codes, scale.view(rows, -1), zero.view(rows, -1), bits)
            return StoredLinear(weight, bits_of(tensors))
        decode = functools.partial(_decode, field, grouped[0], (rows, columns))
        parts = {"W_q": words, "scale": scale, "zero": zero}
        label = f"int{bits} group{size}" + ("" if axis else " axis0")
        return StoredLinear(FileQTensor((rows, columns), label, parts, decode), bits_of(tensors))


def _decode(field: int, count: int, shape: tuple[int, int], parts: Tensors) -> Tensor:
    codes = stacked(parts["W_q"], field, count, from_high=True)
    return ((codes - parts["zero"].float()) * parts["scale"].float()).view(shape)


def _words(name: str, tensors: Tensors, grouped: tuple[int, int]) -> tuple[int, Tensor]:
    """Bits of a code in its packing, and the packed codes of `grouped` rows and columns."""
    packing = bytes(expect(name, "packing", tensors["packing"], torch.uint8, -1).tolist()).decode("latin-1")
    if packing not in _PACKINGS:
        raise unsupported("packing", packing, ", ".join(_PACKINGS))
    field, dtype = _PACKINGS[packing]
    words = tensors["W_q"]
    if words.is_floating_point() and words.dim() == 2:  # view_as_float: the same bytes
        words = words.view(dtype)
    return field, expect(name, "W_q", words, dtype, -(-grouped[0] // (8 * dtype.itemsize // field)), grouped[1])


def _number(name: str, part: str, tensors: Tensors) -> float:
    return float(expect(name, part, tensors[part], _NUMBERS))


def _shape(name: str, sizes: Tensor) -> tuple[int, int]:
    rows, columns = expect(name, "shape", sizes, (torch.int32, torch.int64), 2).tolist()
    if rows < 1 or columns < 1:
        raise damaged(f"{name}.shape is {rows}x{columns}")
    return rows, columns
