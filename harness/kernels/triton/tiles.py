"""The packed layout of weights with codes of 4 or 8 bits; decode and prefill read the same layout.

A weight (N out, K in) is cut into tiles of 64 output rows and 2 `half` inputs, stored one after another along K.
Within a tile, input k and input k + half are stored together: in the low and the high nibble of one byte (4 bits), or
in two neighbouring bytes (8 bits). One load therefore feeds two dots over contiguous inputs.

The bytes of a tile are in the order of the left operand of a 16-bit tensor-core instruction (m64k16 on sm_90 and
m16k16 on sm_80 have the same order). Let w be one of four warps, 4 g + t a lane, s a step of 16 inputs, and r, h and p
bits that each select one of two. The code with these indices belongs to

    row = 16 w + 8 r + g        input = 16 s + 8 h + 2 t + p  (+ half in the high nibble, or the second byte)

and the 32-bit word with fixed (w, g, t, s, h) holds the codes for one or two registers of that lane:

    4 bits: bytes (p r) = 00, 01, 10, 11                8 bits: r selects the word, its bytes are (p, + half)

so `word & 0x000f000f` is the pair of inputs of one register, and no byte is permuted. The 16 bytes of one lane are
contiguous, followed by the other lanes, then by the other warps: a warp reads 512 contiguous bytes at a time. Rows and
inputs that do not fill a tile are padded with codes 0; the kernel masks their inputs. Nothing else is added: if all
tiles are full, the layout is a permutation of the codes that `harness.core.formats.packing` stores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core.formats.elements import Element

ROWS = 64
_HALVES = (64, 32, 16)
_STEP = 16  # inputs of one tensor-core instruction
_SCALE_KINDS = {torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3"}


@dataclass(frozen=True)
class Layout:
    """The tiles of a weight (N, K) with `bits` 4 or 8 and groups of `group_size` inputs.

    Raises: ValueError if no tile fits: other bits, or a group size that is not a multiple of 16 (a group that is a
        whole row may have any size).
    """

    N: int
    K: int
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits={self.bits} has no tile layout; expected 4 or 8")
        if self.group_size < self.K and self.group_size % _STEP:
            raise ValueError(
                f"group_size={self.group_size} has no tile layout; expected a multiple of {_STEP}, or whole rows"
            )

    @property
    def groups(self) -> int:
        return self.K // self.group_size

    @property
    def padded_N(self) -> int:  # noqa: N802 - N and K are the letters of the weight's shape
        return -(-self.N // ROWS) * ROWS

    @property
    def padded_K(self) -> int:  # noqa: N802
        return -(-self.K // (2 * _STEP)) * 2 * _STEP

    @property
    def half(self) -> int:
        """Inputs in half a tile: the largest value that divides the groups, and of which twice divides the padded K."""
        group = self.group_size if self.groups > 1 else self.padded_K
        return next(half for half in _HALVES if self.padded_K % (2 * half) == 0 and group % half == 0)

    @property
    def nbytes(self) -> int:
        return self.padded_N * self.padded_K * self.bits // 8

    @property
    def _source(self) -> tuple[int, ...]:
        """The padded codes as (tile, w, r, g, block, half, chunk, step, h, t, p); a chunk is 16 bytes of each lane."""
        steps = self.half // _STEP
        chunk = min(steps, 8 // self.bits)
        blocks = self.padded_K // (2 * self.half)
        return self.padded_N // ROWS, 4, 2, 8, blocks, 2, steps // chunk, chunk, 2, 4, 2

    @property
    def _order(self) -> tuple[int, ...]:
        """Axes of `_source` in memory order; with 4 bits, the two halves (the last axis) share a byte."""
        if self.bits == 4:
            return 0, 4, 6, 1, 3, 9, 7, 8, 10, 2, 5
        return 0, 4, 6, 1, 3, 9, 7, 8, 2, 10, 5


def pack_codes(codes: Tensor, layout: Layout) -> Tensor:
    """Pack codes (N, K) uint8 into tiles. Returns: flat uint8, `layout.nbytes` bytes."""
    padded = F.pad(codes, (0, layout.padded_K - layout.K, 0, layout.padded_N - layout.N))
    ordered = padded.view(layout._source).permute(layout._order)
    if layout.bits == 8:
        return ordered.reshape(-1)
    return _join_nibbles(ordered).reshape(-1)


def unpack_codes(packed: Tensor, layout: Layout) -> Tensor:
    """The codes (N, K) uint8 that `pack_codes` packed: its inverse."""
    codes = packed if layout.bits == 8 else _split_nibbles(packed)
    ordered_shape = [layout._source[axis] for axis in layout._order]
    inverse_order = [layout._order.index(axis) for axis in range(len(ordered_shape))]
    padded = codes.view(ordered_shape).permute(inverse_order).reshape(layout.padded_N, layout.padded_K)
    return padded[: layout.N, : layout.K].contiguous()


def pack_params(params: Tensor, layout: Layout) -> Tensor:
    """Pack scales or float zero points (N, G), or (1, 1) for the whole tensor, as (G, padded N) in the same dtype."""
    values = params.view(torch.uint8) if params.dtype in _SCALE_KINDS else params  # torch cannot pad 8-bit floats
    padded = F.pad(values.expand(layout.N, layout.groups), (0, 0, 0, layout.padded_N - layout.N))
    return padded.t().contiguous().view(params.dtype)


def unpack_params(packed: Tensor, layout: Layout) -> Tensor:
    """The (N, G) parameters that `pack_params` packed; a value of the whole tensor is repeated in each row."""
    return packed[:, : layout.N].t().contiguous()


def pack_zero_points(zero_points: Tensor, layout: Layout) -> Tensor:
    """Pack uint8 zero points (N, G) or (1, 1) as (G, padded N); with 4 bits two per byte, the even row low."""
    params = pack_params(zero_points, layout)
    return params if layout.bits == 8 else _join_nibbles(params.view(layout.groups, -1, 2))


def unpack_zero_points(packed: Tensor, layout: Layout) -> Tensor:
    """The (N, G) uint8 that `pack_zero_points` packed; a value of the whole tensor is repeated in each row."""
    params = packed if layout.bits == 8 else _split_nibbles(packed).view(layout.groups, -1)
    return unpack_params(params, layout)


@dataclass(frozen=True)
class Packed:
    """A weight as the kernels read it: codes, scales and, unless symmetric, zero points, all packed in `layout`.

    element       the small float that each code is; None for integers
    tensor_scale  one more scale () of all groups, or None
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    layout: Layout
    element: Element | None = None
    tensor_scale: Tensor | None = None

    @property
    def zero_kind(self) -> str:
        """Kind of zero point: "none", "integer" or "float"."""
        if self.zero_point is None:
            return "none"
        return "float" if self.zero_point.is_floating_point() else "integer"

    @property
    def scale_kind(self) -> str:
        """Kind of scale: "e8m0", "e4m3" or "float"."""
        return _SCALE_KINDS.get(self.scale.dtype, "float")


def _join_nibbles(codes: Tensor) -> Tensor:
    return codes[..., 0] | codes[..., 1] << 4


def _split_nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 0xF, packed >> 4), dim=-1)
