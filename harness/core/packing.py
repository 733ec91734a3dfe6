"""Dense bit packing at any width from 1 to 8: code i fills bits [i * bits, (i + 1) * bits) of a byte string.

Bits are counted from the least significant one of byte 0, so eight codes fill exactly `bits` bytes and
no width wastes any; only the last byte of a whole tensor may hold unused bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_LANES = 8  # eight codes of any width end on a byte boundary


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` (any shape, uint8, each under 2^bits) into a flat uint8 tensor.

    Raises: ValueError if a code needs more than `bits` bits.
    """
    flat = codes.reshape(-1)
    if flat.numel() and int(flat.max()) >> bits:
        raise ValueError(f"code {int(flat.max())} does not fit bits={bits}; expected 0 to {(1 << bits) - 1}")
    lanes = F.pad(flat, (0, -flat.numel() % _LANES)).view(-1, _LANES).to(torch.int16)
    out = torch.zeros(lanes.shape[0], bits, dtype=torch.uint8, device=codes.device)
    for lane in range(_LANES):
        byte, shift = divmod(lane * bits, 8)
        spread = lanes[:, lane] << shift
        out[:, byte] |= (spread & 0xFF).to(torch.uint8)
        if shift + bits > 8:
            out[:, byte + 1] |= (spread >> 8).to(torch.uint8)
    return out.view(-1)[: packed_bytes(flat.numel(), bits)].clone()


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The uint8 codes of `shape` that `pack` put into `packed`."""
    count = torch.Size(shape).numel()
    if bits == 8:
        return packed.view(shape)
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        lanes = [
            packed & mask,
            *((packed >> shift) & mask for shift in range(bits, 8 - bits, bits)),
            packed >> 8 - bits,
        ]
        return torch.stack(lanes, -1).view(-1)[:count].view(shape)
    rows = -(-count // _LANES)
    source = F.pad(packed, (0, rows * bits - packed.numel())).view(rows, bits)
    out = torch.empty(rows, _LANES, dtype=torch.uint8, device=packed.device)
    for lane in range(_LANES):
        byte, shift = divmod(lane * bits, 8)
        code = source[:, byte] >> shift
        if shift + bits > 8:  # uint8 arithmetic drops what leaves the byte on the left, as is wanted here
            code |= source[:, byte + 1] << (8 - shift)
        out[:, lane] = code & mask
    return out.view(-1)[:count].view(shape)
