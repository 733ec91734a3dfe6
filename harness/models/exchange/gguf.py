"""GGUF files, as llama.cpp writes them: the rows of each linear in their blocks, found by their values.

transformers decodes a file to a float model, and permutes rows for some architectures. The rows of a linear are found
in the file by their decoded values, which proves the result and needs no table of names.

    Q4_0, Q5_0, Q8_0   (code - middle) scale in groups of 32: float16 scales
    Q3_K, Q6_K         (code - middle) (d s) in groups of 16: float16 d for 256 values, integer s
    Q4_1, Q5_1         code scale + offset in groups of 32
    Q2_K, Q4_K, Q5_K   code (d s) - (dmin m) in groups of 16 and 32
    others             decoded by the functions of the package gguf

Source: ggml, ggml-quants.c and ggml-common.h; gguf, quants.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.core import QTensor
from harness.core.formats import OffsetQTensor, OffsetWeight
from harness.models.architecture import weight_of
from harness.models.exchange.integers import integers
from harness.models.exchange.reader import FileQTensor, StoredLinear, Tensors, damaged

Bytes = NDArray[Any]  # uint8

_SUPER = 256  # values of a block of the K formats
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class StoredMatrix:
    """A quantized matrix of a file: the name of its type, and its rows in bytes (N, bytes of a row)."""

    name: str
    type: str
    rows: Bytes

    def decoded(self) -> NDArray[np.float32]:
        """The float32 matrix (N, K)."""
        return _decode(self.rows, self.type)


@dataclass(frozen=True)
class GGUF:
    """The quantized matrices of a GGUF file."""

    file: Path
    name = "gguf"

    @cached_property
    def matrices(self) -> list[StoredMatrix]:
        """All matrices that are no floats.

        Raises: CheckpointError if the file is damaged.
        """
        return [
            StoredMatrix(tensor.name, tensor.tensor_type.name, tensor.data)
            for tensor in read_gguf(self.file).tensors
            if tensor.tensor_type.name not in _FLOATS and len(tensor.data.shape) == 2
        ]

    def find(self, linears: dict[str, nn.Module]) -> Iterator[tuple[str, StoredLinear]]:
        """Each of the float `linears` whose rows are rows of one matrix, and the linear in the bytes of the file."""
        waiting = dict(linears)
        for matrix in self.matrices:
            if not waiting:
                return
            places = _Places(matrix)
            for name, module in list(waiting.items()):
                rows = places.of(weight_of(module))
                if rows is not None:
                    del waiting[name]
                    yield name, _stored(name, matrix, rows)


def read_gguf(file: Path) -> Any:
    """The opened file.

    Raises: CheckpointError if it is damaged: the sizes that it names are checked before they are read.
    """
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except Exception as error:  # the package raises whatever numpy and struct raise
        raise damaged(f"{file.name} is damaged or no GGUF file: {type(error).__name__}: {error}") from error


class _Places:
    """Where the rows of a matrix are, by their values."""

    def __init__(self, matrix: StoredMatrix) -> None:
        self._decoded = torch.from_numpy(matrix.decoded())
        self._rows: dict[torch.dtype, dict[bytes, int]] = {}

    def of(self, weight: Tensor) -> list[int] | None:
        """The rows of the matrix whose values are those of `weight` (N, K); None if it has none for one of them."""
        if weight.shape[1] != self._decoded.shape[1] or len(weight) > len(self._decoded):
            return None
        if weight.dtype not in self._rows:
            digests = _digests(self._decoded.to(weight.dtype))
            self._rows[weight.dtype] = {digest: row for row, digest in enumerate(digests)}
        rows = []
        for digest in _digests(weight):
            row = self._rows[weight.dtype].get(digest)
            if row is None:
                return None
            rows.append(row)
        return rows


def _digests(rows: Tensor) -> Iterator[bytes]:
    """A hash of the bytes of each row, one after another."""
    data = rows.detach().cpu().contiguous().view(torch.uint8).numpy()
    for row in data:
        yield hashlib.blake2b(row, digest_size=16).digest()


def _stored(name: str, matrix: StoredMatrix, rows: list[int]) -> StoredLinear:
    """The linear of some rows of a matrix."""
    data = matrix.rows[np.array(rows)]
    read = _READ.get(matrix.type)
    if read is not None:
        return StoredLinear(read(name, data), 8 * data.nbytes, label=matrix.type)
    return StoredLinear(_as_file(data, matrix.type), 8 * data.nbytes, label=matrix.type)


def _as_file(data: Bytes, kind: str) -> FileQTensor:
    shape = _decode(data[:1], kind).shape[1]

    def decode(tensors: Tensors) -> Tensor:
        decoded = torch.from_numpy(_decode(tensors["rows"].cpu().numpy(), kind))
        return decoded.to(tensors["rows"].device)

    return FileQTensor((len(data), shape), kind, {"rows": torch.from_numpy(data)}, decode)


def _decode(data: Bytes, kind: str) -> NDArray[np.float32]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    decoded: NDArray[np.float32] = dequantize(data, GGMLQuantizationType[kind])
    return decoded


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
    return _super_grid(name, low | high << 2, scales, _halves(d), 3)


def _read_q6_k(name: str, data: Bytes) -> QTensor:
    """ql (128 bytes): four bits of each code; qh (64): two bits; scales (16) int8; d."""
    blocks = _blocks(data, 210)
    ql, qh, scales, d = np.split(blocks, [128, 192, 208], axis=-1)
    shape = (*ql.shape[:-1], 2, 1, 64)
    low = (ql.reshape(shape) >> np.array([0, 4], dtype=np.uint8)[:, None] & 15).reshape(*ql.shape[:-1], 8, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (qh.reshape(*qh.shape[:-1], 2, 1, 32) >> shifts & 3).reshape(*ql.shape[:-1], 8, 32)
    codes = (low | high << 4).reshape(*ql.shape[:-1], _SUPER)
    return _super_grid(name, codes, scales.view(np.int8), _halves(d), 6)


def _read_q4_1(name: str, data: Bytes) -> QTensor:
    blocks = _blocks(data, 20)
    codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1)
    return _offset_grid(codes, _halves(blocks[..., :2]), _halves(blocks[..., 2:4]), 4)


def _read_q5_1(name: str, data: Bytes) -> QTensor:
    blocks = _blocks(data, 24)
    low = np.concatenate([blocks[..., 8:] & 15, blocks[..., 8:] >> 4], -1)
    high = np.unpackbits(blocks[..., 4:8], axis=-1, bitorder="little")
    return _offset_grid(low | high << 4, _halves(blocks[..., :2]), _halves(blocks[..., 2:4]), 5)


def _read_q2_k(name: str, data: Bytes) -> QTensor:
    """scales (16 bytes): a scale and an offset of four bits each; qs (64): two bits; d, dmin."""
    blocks = _blocks(data, 84)
    packed, qs, d, dmin = np.split(blocks, [16, 80, 82], axis=-1)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    codes = (qs.reshape(*qs.shape[:-1], 2, 1, 32) >> shifts & 3).reshape(*qs.shape[:-1], _SUPER)
    return _super_offset_grid(codes, packed & 15, packed >> 4, d, dmin, 2)


def _read_q4_k(name: str, data: Bytes) -> QTensor:
    """d, dmin; scales (12 bytes): 8 scales and 8 offsets of six bits; qs (128): four bits."""
    blocks = _blocks(data, 144)
    d, dmin, packed, qs = np.split(blocks, [2, 4, 16], axis=-1)
    return _super_offset_grid(_nibbles(qs), *_six_bits(packed), d, dmin, 4)


def _read_q5_k(name: str, data: Bytes) -> QTensor:
    """Likewise with qh (32 bytes), the fifth bit of each code, before qs."""
    blocks = _blocks(data, 176)
    d, dmin, packed, qh, qs = np.split(blocks, [2, 4, 16, 48], axis=-1)
    bits = np.arange(8, dtype=np.uint8)[:, None]
    high = (qh[..., None, :] >> bits & 1).reshape(*qh.shape[:-1], _SUPER)
    return _super_offset_grid(_nibbles(qs) | high << 4, *_six_bits(packed), d, dmin, 5)


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


def _super_offset_grid(codes: Bytes, scales: Bytes, offsets: Bytes, d: Bytes, dmin: Bytes, bits: int) -> QTensor:
    """Codes with integer scales and offsets (N, blocks, groups) below two float16 for each block of 256."""
    scale = _halves(d).float()[..., None] * torch.from_numpy(scales.astype(np.float32))
    offset = _halves(dmin).float()[..., None] * torch.from_numpy(offsets.astype(np.float32))
    return _offset_grid(codes, scale.flatten(1), -offset.flatten(1), bits)


def _offset_grid(codes: Bytes, scale: Tensor, offset: Tensor, bits: int) -> QTensor:
    flat = torch.from_numpy(codes.reshape(len(codes), -1))
    fmt = OffsetWeight(
        bits=bits, granularity="group", group_size=flat.shape[1] // scale.shape[1], scale_dtype="float32"
    )
    return OffsetQTensor(flat, scale, offset, fmt)


def _grid(name: str, codes: Bytes, scale: Tensor, bits: int) -> QTensor:
    """Codes (N, blocks, size) around the middle one, with a scale for each block."""
    return integers(name, torch.from_numpy(codes.reshape(len(codes), -1)), scale, None, bits)


def _super_grid(name: str, codes: Bytes, scales: NDArray[np.int8], d: Tensor, bits: int) -> QTensor:
    """Likewise with integer scales (N, blocks, 16) below a float16 for each block: exact in float32."""
    scale = d.float()[..., None] * torch.from_numpy(scales.astype(np.float32))
    return _grid(name, codes, scale.flatten(1), bits)


_READ: dict[str, Callable[[str, Bytes], QTensor]] = {
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
