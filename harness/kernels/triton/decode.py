"""Device code that decodes packed tiles (see `tiles`) into floats, in the registers that a dot reads.

An integer that fits into the mantissa becomes a float when the exponent bits are set: fp16 0x6400 | q is 1024 + q, bf16
0x4300 | q is 128 + q. Subtracting 1024 or 128 together with the zero point is exact. A 4-bit code therefore costs one
logical operation and one subtraction, both on pairs of codes, and no rounding.

A small float becomes an fp16 or bf16 when its sign and its magnitude, exponent and mantissa together, are moved to
their places: fp16 has 10 bits of mantissa, bf16 has 7. The result is too small by the difference of the biases, also
for subnormal numbers, and a multiplication by a power of two is exact. The element is described by MANTISSA, the bits
of its mantissa (-1: codes are integers), and EXPONENT, those of its exponent.

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

INTEGERS = tl.constexpr(-1)  # the MANTISSA of codes that are integers
_LOGIC = "lop3.b32 $0, {}, $2, $3, 0xea;"  # (a & b) | c
_SHIFTED = "{{ .reg .b32 word; shr.b32 word, $1, {}; " + _LOGIC.format("word") + " }}"
_FIELD_0 = tl.constexpr(_LOGIC.format("$1"))
_FIELD_4, _FIELD_8, _FIELD_12 = (tl.constexpr(_SHIFTED.format(shift)) for shift in (4, 8, 12))


@triton.constexpr_function
def _float_field(shift: int, bits: int, lift: int, mask: int) -> str:
    """Assembly of `float_field` for the two 16-bit words in a register."""
    left = lift - shift
    move = f"shl.b32 word, $1, {left};" if left >= 0 else f"shr.b32 word, $1, {-left};"
    return (
        f"{{ .reg .b32 word, sign; {move} and.b32 word, word, {mask << 16 | mask:#x}; "
        f"shl.b32 sign, $1, {16 - bits - shift}; lop3.b32 $0, sign, 0x80008000, word, 0xea; }}"
    )


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
def float_field(words, SHIFT: tl.constexpr, BITS: tl.constexpr, LIFT: tl.constexpr, ASM: tl.constexpr):
    """Return the floats of the codes at SHIFT, as bits: the magnitude moved left by LIFT, the sign in bit 15."""
    MASK: tl.constexpr = (((1 << (BITS - 1)) - 1) << LIFT) & 0x7FFF
    if ASM:
        asm: tl.constexpr = _float_field(SHIFT, BITS, LIFT, MASK)
        out = tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.uint16, is_pure=True, pack=2)
    else:
        code = words >> SHIFT
        out = ((code << LIFT) & MASK) | ((code << (16 - BITS)) & 0x8000)
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
    a, b = field(words, 0, MASK, MAGIC, ASM), field(words, 8, MASK, MAGIC, ASM)
    c, d = a, b
    if BITS == 4:
        c, d = field(words, 4, MASK, MAGIC, ASM), field(words, 12, MASK, MAGIC, ASM)
    return _halves(a, b, c, d, BITS, HALF, TILES)


@triton.jit
def split_elements(
    words,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    HALF: tl.constexpr,
    TILES: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return small floats / `factor` for both halves of K as the bits of DTYPE, in the shape of `split_words`."""
    LIFT: tl.constexpr = (10 if DTYPE == tl.float16 else 7) - MANTISSA
    a, b = float_field(words, 0, BITS, LIFT, ASM), float_field(words, 8, BITS, LIFT, ASM)
    c, d = a, b
    if BITS == 4:
        c, d = float_field(words, 4, BITS, LIFT, ASM), float_field(words, 12, BITS, LIFT, ASM)
    return _halves(a, b, c, d, BITS, HALF, TILES)


@triton.jit
def _halves(at0, at8, at4, at12, BITS: tl.constexpr, HALF: tl.constexpr, TILES: tl.constexpr):
    """Bring the codes at each place of a word to (row, input), low half and high half; 8 bits have two places."""
    if BITS == 4:
        low, high = _rows(tl.join(at0, at8), HALF, TILES), _rows(tl.join(at4, at12), HALF, TILES)
    else:
        low, high = _pairs(at0, HALF, TILES), _pairs(at8, HALF, TILES)
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
def _floats(bits, DTYPE: tl.constexpr, WORK: tl.constexpr):
    """Return the numbers in WORK whose bits in DTYPE are `bits`."""
    if DTYPE == tl.bfloat16 and WORK == tl.float32:  # the interpreter's own cast loses subnormal numbers
        out = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        out = bits.to(DTYPE, bitcast=True).to(WORK)
    return out


@triton.jit
def split_floats(
    words,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    HALF: tl.constexpr,
    TILES: tl.constexpr,
    DTYPE: tl.constexpr,
    WORK: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return codes + `offset`, or elements / `factor`, for both halves of K, as exact floats (64 TILES, HALF) in WORK.

    WORK is DTYPE, fp16 or bf16, or fp32 in the interpreter, which has no bf16 arithmetic.
    """
    if MANTISSA != INTEGERS:
        low, high = split_elements(words, BITS, MANTISSA, HALF, TILES, DTYPE, ASM)
        low, high = _floats(low, DTYPE, WORK), _floats(high, DTYPE, WORK)
    elif DTYPE == tl.float16:
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


@triton.constexpr_function
def factor(exponent: int, dtype: tl.dtype) -> float:
    """What elements with `exponent` bits of exponent are divided by when their bits are moved to those of `dtype`."""
    return 2.0 ** ((15 if dtype == tl.float16 else 127) - ((1 << exponent - 1) - 1))


@triton.jit
def weights(
    value,
    scale,
    zero,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    EXPONENT: tl.constexpr,
    ZERO: tl.constexpr,
    HOIST: tl.constexpr,
    DTYPE: tl.constexpr,
    WORK: tl.constexpr,
):
    """Return the left operand of the dot in WORK: (codes - zero) scale, or codes - zero with HOIST.

    `value` (R, HALF) comes from `split_floats`; scale and zero are (R) fp32. Integer zero points are subtracted
    exactly. A float zero point is split: its nearest code is subtracted exactly before the scaling, and the remainder,
    scaled, after it. Elements of small floats take the place of codes - zero.
    """
    nearest = zero
    if ZERO == "float":
        nearest = tl.minimum(tl.maximum(tl.floor(zero + 0.5), 0.0), (1 << BITS) - 1.0)
    if MANTISSA != INTEGERS:
        value = value * tl.full((1, 1), factor(EXPONENT, DTYPE), WORK)
    else:
        value = value - (nearest + offset(BITS, DTYPE)).to(WORK)[:, None]
    if not HOIST:
        value = value * scale.to(WORK)[:, None]
        if ZERO == "float":
            value += ((nearest - zero) * scale).to(WORK)[:, None]
    return value


@triton.jit
def load_scales(scale, at, SCALE: tl.constexpr):
    """Load scales as fp32: floats, or, as bytes, powers of two (e8m0) or 8-bit floats (e4m3) that are not negative."""
    stored = tl.load(scale + at)
    if SCALE == "e8m0":
        bits = tl.maximum(stored.to(tl.int32) << 23, 1 << 22)  # 2^-127, the smallest one, is subnormal in fp32
        scales = bits.to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        scales = (stored.to(tl.int32) << 20).to(tl.float32, bitcast=True) * factor(4, tl.float32)
    else:
        scales = stored.to(tl.float32)
    return scales


@triton.jit
def load_params(
    scale, zero, group, groups, rows, width, BITS: tl.constexpr, ZERO: tl.constexpr, SCALE: tl.constexpr
):  # fmt: skip
    """Load scales and zero points of `rows` in `group`, or in the last group if `group` is past it; both (R) fp32.

    `width` is the padded N. If no zero points are stored, they are the middle code.
    """
    group = tl.minimum(group, groups - 1)
    scales = load_scales(scale, group * width + rows, SCALE)
    if ZERO == "none":
        zeros = tl.zeros_like(scales) + (1 << (BITS - 1))
    elif ZERO == "integer" and BITS == 4:
        pair = tl.load(zero + (group * (width // 2) + rows // 2)).to(tl.int32)
        zeros = ((pair >> (rows % 2 * 4)) & 0xF).to(tl.float32)
    else:
        zeros = tl.load(zero + (group * width + rows)).to(tl.float32)
    return scales, zeros
