"""Quantized weights as blocks of GGUF, the inverse of `gguf_types`.

Q4_0, Q5_0, Q8_0   symmetric integers in rows, or in groups of a multiple of 32 inputs, with float16 scales
MXFP4              E2M1 in groups of 32 below powers of two
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from harness.core import FloatQTensor, IntQTensor, QTensor
from harness.models.exchange.gguf_types import Bytes

BLOCK = 32
INTEGERS = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}  # by bits
MXFP4 = "MXFP4"


def blocks_of(weight: QTensor) -> tuple[str, Bytes] | None:
    """The type of a weight (N, K), and the bytes of its rows (N, bytes of a row); None if no type holds it."""
    if weight.shape[1] % BLOCK:
        return None
    if isinstance(weight, IntQTensor):
        return _integers(weight)
    if isinstance(weight, FloatQTensor) and holds_mxfp4(weight.fmt):
        scale = weight.scale.contiguous().view(torch.uint8).numpy()[..., None]
        return MXFP4, np.concatenate([scale, _nibbles(_blocks(weight.codes))], -1).reshape(len(scale), -1)
    return None


def holds_mxfp4(fmt: object) -> bool:
    """Whether a format is that of the type MXFP4."""
    names = ("element", "scale_dtype", "group_size")
    return tuple(getattr(fmt, name, None) for name in names) == ("e2m1", "e8m0", BLOCK)


def _integers(weight: IntQTensor) -> tuple[str, Bytes] | None:
    rows, columns = weight.shape
    span, scale = weight.fmt.span(columns), weight.scale
    if weight.fmt.bits not in INTEGERS or not weight.fmt.symmetric or span % BLOCK:
        return None
    halves = scale.half()
    if not torch.equal(halves.to(scale.dtype), scale):
        return None
    spread = halves.expand(rows, -1).repeat_interleave(span // BLOCK, 1)
    factors = spread.contiguous().view(torch.uint8).view(rows, -1, 2).numpy()
    data = _WRITE[weight.fmt.bits](_blocks(weight.codes))
    return INTEGERS[weight.fmt.bits], np.concatenate([factors, data], -1).reshape(rows, -1)


def _blocks(codes: Tensor) -> Bytes:
    """Codes (N, K) as (N, blocks, 32)."""
    blocks: Bytes = codes.numpy().reshape(len(codes), -1, BLOCK)
    return blocks


def _nibbles(codes: Bytes) -> Bytes:
    """The low four bits of 32 codes in 16 bytes: the first half of the codes in their low halves."""
    low, high = np.split(codes & 15, 2, axis=-1)
    packed: Bytes = low | high << 4
    return packed


def _five(codes: Bytes) -> Bytes:
    return np.concatenate([np.packbits(codes >> 4, axis=-1, bitorder="little"), _nibbles(codes)], -1)


def _eight(codes: Bytes) -> Bytes:
    signed: Bytes = codes ^ 0x80  # from 128 in the middle to int8
    return signed


_WRITE: dict[int, Callable[[Bytes], Bytes]] = {4: _nibbles, 5: _five, 8: _eight}
