"""Device code that decodes packed tiles (see `tiles`) into floats, in the registers that a dot reads.

An integer that fits into the mantissa becomes a float when the exponent bits are set: fp16 0x6400 | q is 1024 + q, bf16
0x4300 | q is 128 + q. Subtracting 1024 or 128 together with the zero point is exact. A 4-bit code therefore costs one
logical operation and one subtraction, both on pairs of codes, and no rounding.

On sm_90 the byte order is that of wgmma's register operand, and no data moves between threads. On sm_80 triton assigns
four neighbouring inputs to a register pair after a join, not two, so int4 codes are shuffled within a warp; int8 codes
need no join and are not shuffled. A broadcast instead of the join went through shared memory on both.
"""

# Triton parses these functions itself: arguments have triton types, and a kernel needs many of them.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: PLR0913, SIM300

from __future__ import annotations

import triton
import triton.language as tl

_LOGIC = "lop3.b32 $0, {}, $2, $3, 0xea;"  # (a & b) | c
_SHIFTED = "{{ .reg .b32 word; shr.b32 word, $1, {}; " + _LOGIC.format("word") + " }}"
_FIELD_0 = tl.constexpr(_LOGIC.format("$1"))
_FIELD_4, _FIELD_8, _FIELD_12 = (tl.constexpr(_SHIFTED.format(shift)) for shift in (4, 8, 12))


@triton.jit
def load_words(packed, first, last, block, blocks, BITS: tl.constexpr, HALF: tl.constexpr, TILES: tl.constexpr):
    """Load the 16-bit words of TILES tiles at `block` of K as (tile, chunk, lane); a lane's 16 bytes are contiguous.

    The axes are in the order in which the compiler assigns them to warps. The tiles start at `first`; beyond `last`,
    tile `last` is loaded again, so that no load needs a mask.
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
def field(words, SHIFT: tl.constexpr, MASK: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr):
    """Return ((words >> SHIFT) & MASK) | MAGIC.

    The assembly handles two words at a time; the compiler splits some of these pairs, which is slow.
    """
    if ASM:
        mask = tl.full((1, 1, 1), MASK, tl.uint16)
        magic = tl.full((1, 1, 1), MAGIC, tl.uint16)
        asm: tl.constexpr = (
            _FIELD_0 if SHIFT == 0 else _FIELD_4 if SHIFT == 4 else _FIELD_8 if SHIFT == 8 else _FIELD_12
        )
        out = tl.inline_asm_elementwise(asm, "=r,r,r,r", [words, mask, magic], dtype=tl.uint16, is_pure=True, pack=2)
    else:
        out = ((words >> SHIFT) & MASK) | MAGIC
    return out


@triton.jit
def split_words(
    words,
    MASK: tl.constexpr,
    MAGIC: tl.constexpr,
    BITS: tl.constexpr,
    HALF: tl.constexpr,
    TILES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return (codes & MASK) | MAGIC for both halves of K, each uint16 (64 TILES, HALF), from words of `load_words`."""
    if BITS == 4:
        low = _rows(tl.join(field(words, 0, MASK, MAGIC, ASM), field(words, 8, MASK, MAGIC, ASM)), HALF, TILES)
        high = _rows(tl.join(field(words, 4, MASK, MAGIC, ASM), field(words, 12, MASK, MAGIC, ASM)), HALF, TILES)
    else:
        low = _pairs(field(words, 0, MASK, MAGIC, ASM), HALF, TILES)
        high = _pairs(field(words, 8, MASK, MAGIC, ASM), HALF, TILES)
    return low, high


@triton.jit
def _rows(codes, HALF: tl.constexpr, TILES: tl.constexpr):
    """Reorder 4-bit codes (tile, chunk, lane, r) to (row, input)."""
    STEPS: tl.constexpr = HALF // 16
    CHUNK: tl.constexpr = STEPS if STEPS < 2 else 2
    parts = tl.reshape(codes, (TILES, STEPS // CHUNK, 4, 8, 4, CHUNK, 2, 2, 2))  # tile c w g t s h p r
    return tl.reshape(tl.permute(parts, (0, 2, 8, 3, 1, 5, 6, 4, 7)), (64 * TILES, HALF))


@triton.jit
def _pairs(codes, HALF: tl.constexpr, TILES: tl.constexpr):
    """Reorder 8-bit codes (tile, chunk, lane) to (row, input)."""
    parts = tl.reshape(codes, (TILES, HALF // 16, 4, 8, 4, 2, 2, 2))  # tile s w g t h r p
    return tl.reshape(tl.permute(parts, (0, 2, 6, 3, 1, 5, 4, 7)), (64 * TILES, HALF))


@triton.jit
def split_floats(
    words,
    BITS: tl.constexpr,
    HALF: tl.constexpr,
    TILES: tl.constexpr,
    DTYPE: tl.constexpr,
    WORK: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return codes + `offset` for both halves of K, each as exact floats (64 TILES, HALF) in WORK.

    WORK is DTYPE, fp16 or bf16, or fp32 in the interpreter, which has no bf16 arithmetic.
    """
    if DTYPE == tl.float16:
        low, high = split_words(words, (1 << BITS) - 1, 0x6400, BITS, HALF, TILES, ASM)
        low = low.to(tl.float16, bitcast=True).to(WORK)
        high = high.to(tl.float16, bitcast=True).to(WORK)
    else:
        low, high = split_words(words, (1 << (BITS - BITS // 8)) - 1, 0x4300, BITS, HALF, TILES, ASM)
        low = low.to(tl.bfloat16, bitcast=True).to(WORK)
        high = high.to(tl.bfloat16, bitcast=True).to(WORK)
        if BITS == 8:
            # bf16 represents 128 + q exactly for seven bits of q. The eighth bit decodes to 256 or 128, minus 256.
            low8, high8 = split_words(words, 0x80, 0x4300, BITS, HALF, TILES, ASM)
            low += low8.to(tl.bfloat16, bitcast=True).to(WORK) - 256
            high += high8.to(tl.bfloat16, bitcast=True).to(WORK) - 256
    return low, high


@triton.jit
def offset(BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The number that `split_floats` adds to the codes; its sum with a zero point is still exact in DTYPE."""
    return 1024.0 if DTYPE == tl.float16 else 128.0 if BITS == 4 else 0.0


@triton.jit
def weights(
    value,
    scale,
    zero,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    HOIST: tl.constexpr,
    DTYPE: tl.constexpr,
    WORK: tl.constexpr,
):
    """Return the left operand of the dot in WORK: (codes - zero) scale, or codes - zero with HOIST.

    `value` (R, HALF) comes from `split_floats`; scale and zero are (R) fp32. Integer zero points are subtracted
    exactly. A float zero point is split: its nearest code is subtracted exactly before the scaling, and the remainder,
    scaled, after it.
    """
    nearest = zero
    if ZERO == "float":
        nearest = tl.minimum(tl.maximum(tl.floor(zero + 0.5), 0.0), (1 << BITS) - 1.0)
    value = value - (nearest + offset(BITS, DTYPE)).to(WORK)[:, None]
    if not HOIST:
        value = value * scale.to(WORK)[:, None]
        if ZERO == "float":
            value += ((nearest - zero) * scale).to(WORK)[:, None]
    return value


@triton.jit
def load_params(scale, zero, group, groups, rows, width, BITS: tl.constexpr, ZERO: tl.constexpr):
    """Load scales and zero points of `rows` in `group`, or in the last group if `group` is past it; both (R) fp32.

    `width` is the padded N. If no zero points are stored, they are the middle code.
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
