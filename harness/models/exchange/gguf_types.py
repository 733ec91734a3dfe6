"""The types of GGUF whose values lie on integer grids: blocks of bytes to codes, scales and offsets.

    Q4_0, Q5_0, Q8_0   (code - middle) scale in groups of 32: float16 scales
    Q3_K, Q6_K         (code - middle) (d s) in groups of 16: float16 d for 256 values, integer s
    Q4_1, Q5_1         code scale + offset in groups of 32
    Q2_K, Q4_K, Q5_K   code (d s) - (dmin m) in groups of 16 and 32

Source: ggml, ggml-quants.c and ggml-common.h; gguf, quants.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.core import QTensor
from harness.models.exchange.integers import integers, offsets

Bytes = NDArray[Any]  # uint8

_SUPER = 256  # values of a block of the K formats


def _blocks(data: Bytes, size: int) -> Bytes:
    """Rows of bytes (N, B) as blocks of `size` bytes, (N, blocks, size)."""
    return data.reshape(len(data), -1, size)


def _halves(data: Bytes) -> Tensor:
    """Bytes (..., 2) as float16."""
    return torch.from_numpy(np.ascontiguousarray(data).view(np.float16)[..., 0])


def _read_q4_0(name: str, data: Bytes) -> QTensor:
    blocks = _blocks(data, 18)
    codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1)
    return _grid(name, codes, _halves(blocks[..., :2]), 4)


def _read_q5_0(name: str, data: Bytes) -> QTensor:
    blocks = _blocks(data, 22)
    low = np.concatenate([blocks[..., 6:] & 15, blocks[..., 6:] >> 4], -1)
    high = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
    return _grid(name, low | high << 4, _halves(blocks[..., :2]), 5)


def _read_q8_0(name: str, data: Bytes) -> QTensor:
    blocks = _blocks(data, 34)
    return _grid(name, blocks[..., 2:] ^ 0x80, _halves(blocks[..., :2]), 8)  # int8 plus 128


def _read_q3_k(name: str, data: Bytes) -> QTensor:
    """hmask (32 bytes): the third bit of each code; qs (64): two bits; scales (12): 16 of 6 bits, minus 32; d."""
    blocks = _blocks(data, 110)
    hmask, qs, packed, d = np.split(blocks, [32, 96, 108], axis=-1)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    low = (qs.reshape(*qs.shape[:-1], 2, 1, 32) >> shifts & 3).reshape(*qs.shape[:-1], _SUPER)
    bits = np.arange(8, dtype=np.uint8)[:, None]
    high = (hmask[..., None, :] >> bits & 1).reshape(*qs.shape[:-1], _SUPER)
    nibbles = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], -1)
    tops = packed[..., None, 8:] >> shifts & 3
    scales = (nibbles | tops.reshape(*nibbles.shape) << 4).astype(np.int8) - 32
    return _grid(name, low | high << 2, _below(d, scales), 3)


def _read_q6_k(name: str, data: Bytes) -> QTensor:
    """ql (128 bytes): four bits of each code; qh (64): two bits; scales (16) int8; d."""
    blocks = _blocks(data, 210)
    ql, qh, scales, d = np.split(blocks, [128, 192, 208], axis=-1)
    shape = (*ql.shape[:-1], 2, 1, 64)
    low = (ql.reshape(shape) >> np.array([0, 4], dtype=np.uint8)[:, None] & 15).reshape(*ql.shape[:-1], 8, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (qh.reshape(*qh.shape[:-1], 2, 1, 32) >> shifts & 3).reshape(*ql.shape[:-1], 8, 32)
    codes = (low | high << 4).reshape(*ql.shape[:-1], _SUPER)
    return _grid(name, codes, _below(d, scales.view(np.int8)), 6)


def _read_q4_1(name: str, data: Bytes) -> QTensor:
    blocks = _blocks(data, 20)
    codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1)
    return _offset_grid(name, codes, _halves(blocks[..., :2]), _halves(blocks[..., 2:4]), 4)


def _read_q5_1(name: str, data: Bytes) -> QTensor:
    blocks = _blocks(data, 24)
    low = np.concatenate([blocks[..., 8:] & 15, blocks[..., 8:] >> 4], -1)
    high = np.unpackbits(blocks[..., 4:8], axis=-1, bitorder="little")
    return _offset_grid(name, low | high << 4, _halves(blocks[..., :2]), _halves(blocks[..., 2:4]), 5)


def _read_q2_k(name: str, data: Bytes) -> QTensor:
    """scales (16 bytes): a scale and an offset of four bits each; qs (64): two bits; d, dmin."""
    blocks = _blocks(data, 84)
    packed, qs, d, dmin = np.split(blocks, [16, 80, 82], axis=-1)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    codes = (qs.reshape(*qs.shape[:-1], 2, 1, 32) >> shifts & 3).reshape(*qs.shape[:-1], _SUPER)
    return _offset_grid(name, codes, _below(d, packed & 15), -_below(dmin, packed >> 4), 2)


def _read_q4_k(name: str, data: Bytes) -> QTensor:
    """d, dmin; scales (12 bytes): 8 scales and 8 offsets of six bits; qs (128): four bits."""
    blocks = _blocks(data, 144)
    d, dmin, packed, qs = np.split(blocks, [2, 4, 16], axis=-1)
    scales, mins = _six_bits(packed)
    return _offset_grid(name, _nibbles(qs), _below(d, scales), -_below(dmin, mins), 4)


def _read_q5_k(name: str, data: Bytes) -> QTensor:
    """Likewise with qh (32 bytes), the fifth bit of each code, before qs."""
    blocks = _blocks(data, 176)
    d, dmin, packed, qh, qs = np.split(blocks, [2, 4, 16, 48], axis=-1)
    bits = np.arange(8, dtype=np.uint8)[:, None]
    high = (qh[..., None, :] >> bits & 1).reshape(*qh.shape[:-1], _SUPER)
    scales, mins = _six_bits(packed)
    return _offset_grid(name, _nibbles(qs) | high << 4, _below(d, scales), -_below(dmin, mins), 5)


def _nibbles(qs: Bytes) -> Bytes:
    """Codes (..., 256) of bytes (..., 128): 32 bytes hold 32 values in their low halves, then 32 in their high ones."""
    shifts = np.array([0, 4], dtype=np.uint8)[:, None]
    return (qs.reshape(*qs.shape[:-1], 4, 1, 32) >> shifts & 15).reshape(*qs.shape[:-1], _SUPER)


def _six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The 8 scales and the 8 offsets in 12 bytes: six bits of four each, and the other four of each in two parts."""
    scales, offsets, rest = np.split(packed, [4, 8], axis=-1)
    late_scales = rest & 15 | (scales >> 6) << 4
    late_offsets = rest >> 4 | (offsets >> 6) << 4
    return np.concatenate([scales & 63, late_scales], -1), np.concatenate([offsets & 63, late_offsets], -1)


def _below(d: Bytes, factors: NDArray[Any]) -> Tensor:
    """Integer factors (N, blocks, groups) times a float16 for each block of 256: (N, G), exact in float32."""
    return (_halves(d).float()[..., None] * torch.from_numpy(factors.astype(np.float32))).flatten(1)


def _offset_grid(name: str, codes: Bytes, scale: Tensor, offset: Tensor, bits: int) -> QTensor:
    return offsets(name, torch.from_numpy(codes.reshape(len(codes), -1)), scale, offset, bits)


def _grid(name: str, codes: Bytes, scale: Tensor, bits: int) -> QTensor:
    """Codes (N, blocks, size) around the middle one, with a scale for each block."""
    return integers(name, torch.from_numpy(codes.reshape(len(codes), -1)), scale, None, bits)


READ: dict[str, Callable[[str, Bytes], QTensor]] = {
    "Q2_K": _read_q2_k,
    "Q4_0": _read_q4_0,
    "Q4_1": _read_q4_1,
    "Q4_K": _read_q4_k,
    "Q5_1": _read_q5_1,
    "Q5_K": _read_q5_k,
    "Q5_0": _read_q5_0,
    "Q8_0": _read_q8_0,
    "Q3_K": _read_q3_k,
    "Q6_K": _read_q6_k,
}
