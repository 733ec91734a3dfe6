"""Kernels of the weight-only matmul y = x W^T + b with packed weights (see `tiles`): x (M, K), W (N, K), y (M, N).

The weights are the left operand of every dot, W x^T, so that on sm_90 they go directly from the registers in which
they are decoded into the tensor cores. With HOIST, the dot takes codes minus zero points, which are exact in 16 bits,
and groups are scaled in fp32 after the dot: no weight is rounded. Without HOIST, weights are scaled, and rounded,
before the dot; this takes fewer registers and does not interrupt the tensor cores. The same kernels decode integers
and small floats (see `decode`); a scale of the whole tensor multiplies sums in fp32.
"""

# Triton parses these functions itself: arguments have triton types, and a kernel needs many of them.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: PLR0913

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.triton.decode import (
    INTEGERS,
    factor,
    load_params,
    load_words,
    split_floats,
    split_words,
    weights,
)


@triton.jit
def load_inputs(x, at, M, K, columns, HALF: tl.constexpr, EVEN_K: tl.constexpr, WORK: tl.constexpr):
    """Load inputs `at` to `at` + HALF of the rows `columns` of x, transposed: (HALF, BLOCK_M) in WORK, 0 outside x."""
    k = at + tl.arange(0, HALF)
    mask = (columns < M)[None, :]
    if not EVEN_K:
        mask = mask & (k < K)[:, None]
    return tl.load(x + (columns.to(tl.int64)[None, :] * K + k[:, None]), mask=mask, other=0.0).to(WORK)


@triton.jit
def load_halves(
    scale,
    zero,
    block,
    groups,
    rows,
    width,
    BITS: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Load scales and zero points of both halves of a block, only once if both halves are in the same group."""
    at = block * (2 * HALF)
    s0, z0 = load_params(scale, zero, at // GROUP if GROUP else 0, groups, rows, width, BITS, ZERO, SCALE)
    s1, z1 = s0, z0
    if GROUP % (2 * HALF):
        s1, z1 = load_params(scale, zero, (at + HALF) // GROUP, groups, rows, width, BITS, ZERO, SCALE)
    return s0, z0, s1, z1


@triton.jit
def add_products(acc, w0, x0, w1, x1, s0, s1, HALF: tl.constexpr, GROUP: tl.constexpr, HOIST: tl.constexpr):
    """Return acc + w0 x0 + w1 x1. With HOIST and groups smaller than rows, each product is multiplied by its scale."""
    if HOIST and GROUP:
        zeros = tl.zeros_like(acc)
        part = tl.dot(w0, x0, zeros)
        if GROUP % (2 * HALF):
            acc += part * s0[:, None]
            acc += tl.dot(w1, x1, zeros) * s1[:, None]
        else:
            acc += tl.dot(w1, x1, part) * s0[:, None]
    else:
        acc = tl.dot(w1, x1, tl.dot(w0, x0, acc))
    return acc


@triton.jit(do_not_specialize=["M"])  # so that a new number of rows needs no compilation
def matmul_kernel(
    x,
    packed,
    scale,
    zero,
    whole,
    bias,
    out,
    M,
    N,
    K,
    groups,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    EXPONENT: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BIAS: tl.constexpr,
    HOIST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WORK: tl.constexpr,
    ASM: tl.constexpr,
):
    """Write to `out` (SPLIT_K, M, N) the sum over each part of K, in its dtype; grid (tiles of N and M, SPLIT_K).

    GROUP is the group size, or 0 for whole rows. ZERO is "none", "integer" or "float", SCALE "float", "e8m0" or "e4m3".
    `whole` points to the scale of the whole tensor, or is None. WORK is the dtype of the dot's
    operands: that of x, or fp32 for bf16 in the interpreter, which has no bf16. ASM allows inline assembly.
    """
    grid_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    pid_n, pid_m = tl.swizzle2d(pid // grid_m, pid % grid_m, tl.cdiv(N, BLOCK_N), grid_m, 8)
    split = tl.program_id(1)
    DTYPE: tl.constexpr = x.dtype.element_ty
    TILES: tl.constexpr = BLOCK_N // 64
    last = tl.cdiv(N, 64) - 1
    width = (last + 1) * 64
    rows = tl.minimum(pid_n * BLOCK_N + tl.arange(0, BLOCK_N), width - 1)
    columns = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    blocks = tl.cdiv(K, 2 * HALF)
    share = tl.cdiv(blocks, SPLIT_K)
    start = split * share

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Scales are loaded one iteration ahead: rows are too narrow for the asynchronous copies of the other operands.
    s0, z0, s1, z1 = load_halves(scale, zero, start, groups, rows, width, BITS, HALF, GROUP, ZERO, SCALE)
    for block in range(start, tl.minimum(start + share, blocks)):
        at = block * (2 * HALF)
        x0 = load_inputs(x, at, M, K, columns, HALF, EVEN_K, WORK)
        x1 = load_inputs(x, at + HALF, M, K, columns, HALF, EVEN_K, WORK)
        words = load_words(packed, pid_n * TILES, last, block, blocks, BITS, HALF, TILES)
        low, high = split_floats(words, BITS, MANTISSA, HALF, TILES, DTYPE, WORK, ASM)
        w0 = weights(low, s0, z0, BITS, MANTISSA, EXPONENT, ZERO, HOIST, DTYPE, WORK)
        w1 = weights(high, s1, z1, BITS, MANTISSA, EXPONENT, ZERO, HOIST, DTYPE, WORK)
        acc = add_products(acc, w0, x0, w1, x1, s0, s1, HALF, GROUP, HOIST)
        if GROUP:
            s0, z0, s1, z1 = load_halves(scale, zero, block + 1, groups, rows, width, BITS, HALF, GROUP, ZERO, SCALE)
    if HOIST and not GROUP:
        acc = acc * s0[:, None]
    if whole is not None:
        acc = acc * tl.load(whole)

    rows = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if BIAS:
        acc += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out + (split.to(tl.int64) * M * N + columns.to(tl.int64)[None, :] * N + rows[:, None])
    tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=(rows < N)[:, None] & (columns < M)[None, :])


@triton.jit(do_not_specialize=["count"])
def reduce_kernel(parts, bias, out, count, N, SPLIT_K: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Write to `out` (M, N) the sum of `parts` (SPLIT_K, M, N) fp32 in order, plus the bias; `count` is M N."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    total = tl.load(parts + at, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLIT_K):
        total += tl.load(parts + (split * count.to(tl.int64) + at), mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_kernel(
    packed,
    scale,
    zero,
    whole,
    out,
    N,
    K,
    groups,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    EXPONENT: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Write the weight to `out` (N, K), computed in fp32; one tile per program, grid (tiles of N, blocks of K)."""
    tile = tl.program_id(0)
    block = tl.program_id(1)
    blocks = tl.cdiv(K, 2 * HALF)
    width = tl.cdiv(N, 64) * 64
    rows = tile * 64 + tl.arange(0, 64)
    words = load_words(packed, tile, tile, block, blocks, BITS, HALF, 1)
    if MANTISSA != INTEGERS:
        low, high = split_floats(words, BITS, MANTISSA, HALF, 1, tl.float16, tl.float32, ASM)
    else:
        low, high = split_words(words, (1 << BITS) - 1, 0, BITS, HALF, 1, ASM)
    at = block * (2 * HALF)
    for half in tl.static_range(2):
        group = (at + half * HALF) // GROUP if GROUP else 0
        scales, zeros = load_params(scale, zero, group, groups, rows, width, BITS, ZERO, SCALE)
        if whole is not None:
            scales *= tl.load(whole)
        codes = high if half else low
        if MANTISSA != INTEGERS:
            values = codes * factor(EXPONENT, tl.float16) * scales[:, None]
        else:
            values = (codes.to(tl.float32) - zeros[:, None]) * scales[:, None]
        k = at + half * HALF + tl.arange(0, HALF)
        mask = (rows < N)[:, None] & (k < K)[None, :]
        tl.store(out + (rows.to(tl.int64)[:, None] * K + k[None, :]), values.to(out.dtype.element_ty), mask=mask)
