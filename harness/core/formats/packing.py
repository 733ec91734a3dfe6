"""Dense bit packing at any width from 1 to 16: code i fills bits [i * bits, (i + 1) * bits) of a byte string.

Bits are counted from the least significant bit of byte 0. Eight codes fill exactly `bits` bytes, so no width wastes
bits; only the last byte of a whole tensor may hold unused bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_WIDEST = 16
_LANES = 8  # eight codes of any width end on a byte boundary


def packed_bytes(count: int, bits: int) -> int:
    """Number of bytes that `count` codes of `bits` bits fill, rounded up."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` (any shape and integer dtype, each in [0, 2^bits - 1]) into a flat uint8 tensor.

    Raises: ValueError if a code is negative or needs more than `bits` bits, or `bits` is not from 1 to 16.
    """
    _check_width(bits)
    flat = codes.reshape(-1)
    _check_codes(flat, bits)
    wide = torch.int16 if bits <= 8 else torch.int32  # holds a code shifted by up to 7
    lanes = F.pad(flat, (0, -flat.numel() % _LANES)).view(-1, _LANES).to(wide)
    out = torch.zeros(lanes.shape[0], bits, dtype=torch.uint8, device=codes.device)
    for lane in range(_LANES):
        byte, shift = divmod(lane * bits, 8)
        spread = lanes[:, lane] << shift
        for i in range(packed_bytes(1, shift + bits)):
            out[:, byte + i] |= (spread >> 8 * i & 0xFF).to(torch.uint8)
    return out.view(-1)[: packed_bytes(flat.numel(), bits)].clone()


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Codes of `shape` from a tensor that `pack` returned: uint8 up to 8 bits, int32 above.

    Raises: ValueError if `bits` is not from 1 to 16.
    """
    _check_width(bits)
    count = torch.Size(shape).numel()
    if bits == 8:
        return packed.view(shape)
    if 8 % bits == 0:
        return _split_bytes(packed, bits).view(-1)[:count].view(shape)
    rows = -(-count // _LANES)
    source = F.pad(packed, (0, rows * bits - packed.numel())).view(rows, bits)
    lanes = _narrow_lanes(source, bits) if bits < 8 else _wide_lanes(source, bits)
    return lanes.view(-1)[:count].view(shape)


def _split_bytes(packed: Tensor, bits: int) -> Tensor:
    """Split each byte into codes of 1, 2 or 4 bits: (bytes, 8 / bits) uint8."""
    mask = (1 << bits) - 1
    middle = [(packed >> shift) & mask for shift in range(bits, 8 - bits, bits)]
    return torch.stack([packed & mask, *middle, packed >> 8 - bits], -1)


def _narrow_lanes(source: Tensor, bits: int) -> Tensor:
    """Codes of fewer than 8 bits, (rows, 8) uint8, from bytes `source` (rows, bits)."""
    out = torch.empty(len(source), _LANES, dtype=torch.uint8, device=source.device)
    for lane in range(_LANES):
        byte, shift = divmod(lane * bits, 8)
        code = source[:, byte] >> shift
        if shift + bits > 8:  # the code continues in the next byte; uint8 drops the bits shifted above 7
            code |= source[:, byte + 1] << (8 - shift)
        out[:, lane] = code & (1 << bits) - 1
    return out


def _wide_lanes(source: Tensor, bits: int) -> Tensor:
    """Codes of more than 8 bits, (rows, 8) int32, from bytes `source` (rows, bits)."""
    wide = source.to(torch.int32)
    out = torch.empty(len(source), _LANES, dtype=torch.int32, device=source.device)
    for lane in range(_LANES):
        byte, shift = divmod(lane * bits, 8)
        code = wide[:, byte] >> shift
        for i in range(1, packed_bytes(1, shift + bits)):
            code |= wide[:, byte + i] << 8 * i - shift
        out[:, lane] = code & (1 << bits) - 1
    return out


def _check_width(bits: int) -> None:
    if not 1 <= bits <= _WIDEST:
        raise ValueError(f"bits={bits} is out of range; expected 1 to {_WIDEST}")


def _check_codes(flat: Tensor, bits: int) -> None:
    for code in (int(flat.min()), int(flat.max())) if flat.numel() else ():
        if code >> bits:  # also true for a negative code, whose shift is -1
            raise ValueError(f"code {code} does not fit bits={bits}; expected 0 to {(1 << bits) - 1}")
