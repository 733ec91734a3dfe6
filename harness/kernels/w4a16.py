"""Weight-only matmul"""

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.decode import centre, load_words, load_zero, split_words


@triton.jit
def matmul_kernel(
    x, packed, scale, zero, bias, out,
    M, N, K, blocks,
    BITS: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, ZERO: tl.constexpr,
    EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT_K: tl.constexpr, HOIST: tl.constexpr, WIDE: tl.constexpr,
):
    tiles = (N + 63) // 64
    grid_n = (N + BLOCK_N - 1) // BLOCK_N
    grid_m = (M + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    pid_n, pid_m = tl.swizzle2d(pid // grid_m, pid % grid_m, grid_n, grid_m, 8)
    split = tl.program_id(1)
    DTYPE: tl.constexpr = x.dtype.element_ty
    rows = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    params = tl.minimum(rows, tiles * 64 - 1)
    columns = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (columns < M)[None, :]
    k = tl.arange(0, HALF)
    xs = x + (columns.to(tl.int64)[None, :] * K + k[:, None])
    share = (blocks + SPLIT_K - 1) // SPLIT_K
    start = split * share
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(start, tl.minimum(start + share, blocks)):
        words = load_words(packed, pid_n * (BLOCK_N // 64), tiles - 1, block, blocks, BITS, HALF, BLOCK_N // 64)
        low, high = split_words(words, BITS, HALF, BLOCK_N // 64)
        at = block * (2 * HALF)
        g0 = at // GROUP
        g1 = (at + HALF) // GROUP
        if EVEN_K:
            x0 = tl.load(xs + at, mask=inside, other=0.0)
            x1 = tl.load(xs + (at + HALF), mask=inside, other=0.0)
        else:
            g0 = tl.minimum(g0, GROUPS - 1)
            g1 = tl.minimum(g1, GROUPS - 1)
            x0 = tl.load(xs + at, mask=inside & (k + at < K)[:, None], other=0.0)
            x1 = tl.load(xs + (at + HALF), mask=inside & (k + (at + HALF) < K)[:, None], other=0.0)
        z0 = load_zero(zero, g0, params, tiles * 64, BITS, ZERO)
        z1 = load_zero(zero, g1, params, tiles * 64, BITS, ZERO)
        s0 = tl.load(scale + (g0 * (tiles * 64) + params))
        s1 = tl.load(scale + (g1 * (tiles * 64) + params))
        w0 = centre(low, z0, BITS, DTYPE)
        w1 = centre(high, z1, BITS, DTYPE)
        if not HOIST:
            w0 = w0 * s0.to(DTYPE)[:, None]
            w1 = w1 * s1.to(DTYPE)[:, None]
            acc = tl.dot(w0, x0, acc)
            acc = tl.dot(w1, x1, acc)
        else:
            part = tl.dot(w0, x0)
            if GROUP % (2 * HALF) == 0:
                part = tl.dot(w1, x1, part)
                acc += part * s0.to(tl.float32)[:, None]
            else:
                acc += part * s0.to(tl.float32)[:, None]
                acc += tl.dot(w1, x1) * s1.to(tl.float32)[:, None]
    at = out + (split.to(tl.int64) * M * N + columns[None, :].to(tl.int64) * N + rows[:, None])
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside & (rows < N)[:, None])
