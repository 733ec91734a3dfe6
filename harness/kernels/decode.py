"""Device code that turns packed tiles (see `tiles`) into floats in the registers where a dot wants them.

An integer below the mantissa's length becomes a float by setting an exponent: fp16 0x6400 | q is 1024 + q, bf16
0x4300 | q is 128 + q. Subtracting 1024 or 128, and the zero point with it, is exact, so a code of 4 bits costs one
logical operation and one subtraction, both on pairs, and no rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_words(packed, first, last, block, blocks, BITS: tl.constexpr, HALF: tl.constexpr, TILES: tl.constexpr):
    """The 16-bit words of TILES tiles at `block` of K, as (tile, chunk, lane): each lane's 16 bytes are contiguous.

    The axes are in the order in which the compiler gives them to warps. Tiles from `first` on; past `last` that one again, so that no load needs a mask.
    """
    WORDS: tl.constexpr = 8 * HALF * BITS
    CHUNK: tl.constexpr = WORDS if WORDS < 1024 else 1024
    CHUNKS: tl.constexpr = WORDS // CHUNK
    chunk = tl.arange(0, CHUNKS)[None, :, None]
    tile = tl.minimum(first + tl.arange(0, TILES), last)[:, None, None]
    lane = tl.arange(0, CHUNK)[None, None, :]
    start = (tile.to(tl.int64) * blocks + block) * WORDS
    return tl.load(packed + (start + chunk * CHUNK + lane), eviction_policy="evict_first")


@triton.jit
def split_words(words, BITS: tl.constexpr, HALF: tl.constexpr, TILES: tl.constexpr):
    """The codes (64 TILES, HALF) of both halves of K, uint16, from `load_words`. Moves nothing between threads."""
    if BITS == 4:
        low = _rows(tl.join(words & 0xF, (words >> 8) & 0xF), HALF, TILES)
        high = _rows(tl.join((words >> 4) & 0xF, words >> 12), HALF, TILES)
    else:
        low = _pairs(words & 0xFF, HALF, TILES)
        high = _pairs(words >> 8, HALF, TILES)
    return low, high


@triton.jit
def _rows(codes, HALF: tl.constexpr, TILES: tl.constexpr):
    """Codes of 4 bits (tile, chunk, lane, r) as (row, input)."""
    STEPS: tl.constexpr = HALF // 16
    CHUNK: tl.constexpr = STEPS if STEPS < 2 else 2
    parts = tl.reshape(codes, (TILES, STEPS // CHUNK, 4, 8, 4, CHUNK, 2, 2, 2))  # tile c w g t s h p r
    return tl.reshape(tl.permute(parts, (0, 2, 8, 3, 1, 5, 6, 4, 7)), (64 * TILES, HALF))


@triton.jit
def _pairs(codes, HALF: tl.constexpr, TILES: tl.constexpr):
    """Codes of 8 bits (tile, chunk, lane) as (row, input)."""
    parts = tl.reshape(codes, (TILES, HALF // 16, 4, 8, 4, 2, 2, 2))  # tile s w g t h r p
    return tl.reshape(tl.permute(parts, (0, 2, 6, 3, 1, 5, 4, 7)), (64 * TILES, HALF))


@triton.jit
def centre(codes, zero, BITS: tl.constexpr, DTYPE: tl.constexpr, WORK: tl.constexpr):
    """codes (R, HALF) - zero (R), exactly, in WORK; `zero` holds whole numbers in 0 .. 2^BITS - 1, as fp32.

    WORK is DTYPE, fp16 or bf16, or fp32 for the interpreter, whose bf16 is no number.
    """
    if DTYPE == tl.float16:
        value = (codes | 0x6400).to(tl.float16, bitcast=True).to(WORK) - (zero + 1024).to(WORK)[:, None]
    elif BITS == 4:
        value = (codes | 0x4300).to(tl.bfloat16, bitcast=True).to(WORK) - (zero + 128).to(WORK)[:, None]
    else:
        # Seven bits are all that bf16 adds exactly to 128; the eighth decides whether 256 or 128 is taken off again.
        seven = ((codes & 0x7F) | 0x4300).to(tl.bfloat16, bitcast=True).to(WORK)
        signed = seven - ((codes & 0x80) ^ 0x4380).to(tl.bfloat16, bitcast=True).to(WORK)
        value = signed + (128 - zero).to(WORK)[:, None]
    return value


@triton.jit
def weights(
    codes,
    scale,
    zero,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    HOIST: tl.constexpr,
    DTYPE: tl.constexpr,
    WORK: tl.constexpr,
):
    """What is multiplied with the inputs: (codes - zero) scale, or codes - zero where HOIST, of (R, HALF), in WORK.

    A float zero point is split: its nearest code is subtracted exactly, and what is left goes in with the scale.
    """
    nearest = zero
    if ZERO == "float":
        nearest = tl.minimum(tl.maximum(tl.floor(zero + 0.5), 0.0), (1 << BITS) - 1.0)
    value = centre(codes, nearest, BITS, DTYPE, WORK)
    if not HOIST:
        value = value * scale.to(WORK)[:, None]
        if ZERO == "float":
            value += ((nearest - zero) * scale).to(WORK)[:, None]
    return value


@triton.jit
def load_params(scale, zero, group, groups, rows, width, BITS: tl.constexpr, ZERO: tl.constexpr):
    """Scales and zero points of `rows` in `group`, or in the last where that is past it; both (R) fp32.

    `width` is the padded N; zero points are the middle code where none are stored.
    """
    group = tl.minimum(group, groups - 1)
    scales = tl.load(scale + (group * width + rows)).to(tl.float32)
    if ZERO == "none":
        zeros = tl.zeros_like(scales) + (1 << (BITS - 1))
    elif ZERO == "integer" and BITS == 4:
        pair = tl.load(zero + (group * (width // 2) + rows // 2)).to(tl.int32)
        zeros = ((pair >> (rows % 2 * 4)) & 0xF).to(tl.float32)
    else:
        zeros = tl.load(zero + (group * width + rows)).to(tl.float32)
    return scales, zeros
