"""Kernels of the int8 matmul: y = codes_x codes_w^T * scale_x * scale_w + bias.

The weight (N, K) is the left operand of the dot, so that N fills the rows of the tensor core even if the input has few
rows M. Outlier channels (LLM.int8()) have code 0 in x. A second loop over K adds them as floats and skips each block of
channels whose flag is 0 (no outlier). It starts from acc * scale_x, so that one accumulator serves both loops.
"""

# Triton parses these functions itself: arguments have triton types, and a kernel needs many of them.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: PLR0913

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(tiles_n, tiles_m, GROUP: tl.constexpr):
    """Indices of this program's tile; the order covers all m before the next group of n."""
    program = tl.program_id(0)
    width = GROUP * tiles_m
    first = program // width * GROUP
    rows = tl.minimum(tiles_n - first, GROUP)
    return first + program % width % rows, program % width // rows


@triton.jit
def _epilogue(value, w_scale_ptr, bias_ptr, n, inside, W_STEP: tl.constexpr):
    """value * w_scale + bias; W_STEP is 0 if one scale serves all n."""
    value *= tl.load(w_scale_ptr + n * W_STEP, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _add_outliers(
    acc, w_ptr, x_ptr, outlier_ptr, flag_ptr, n, m, n_left, m_left, sequence, K, first, last,
    BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add codes_w x^T over the outlier channels in blocks [first, last) of K to acc (n, m).

    The pointers point to the first rows of the tile, of which n_left and m_left exist. `sequence` (m,) holds the row of
    the outlier marks for each m.
    """
    for block in range(first, last):
        if tl.load(flag_ptr + block) != 0:
            k = block * BLOCK_K + tl.arange(0, BLOCK_K)
            w = tl.load(w_ptr + n[:, None] * K + k[None, :], mask=(n < n_left)[:, None] & (k < K)[None, :], other=0)
            inside = (k < K)[:, None] & (m < m_left)[None, :]
            x = tl.load(x_ptr + k[:, None] + m[None, :] * K, mask=inside, other=0.0)
            marks = tl.load(outlier_ptr + k[:, None] + sequence[None, :] * K, mask=inside, other=0)
            dtype: tl.constexpr = tl.float32 if UPCAST else x.dtype
            x = tl.where(marks != 0, x.to(dtype), 0.0)
            acc = tl.dot(w.to(dtype), x, acc, input_precision="tf32x3")  # affects only float32
    return acc


@triton.jit(do_not_specialize=["M", "rows_per_outlier", "blocks_a_part"])  # no compilation per number of rows
def matmul_kernel(
    w_ptr,  # codes (N, K) int8
    x_ptr,  # codes (M, K) int8
    w_scale_ptr,  # (N,), or (1,) with W_STEP 0
    x_scale_ptr,  # (M,) fp32
    bias_ptr,  # (N,) or None
    float_ptr,  # x (M, K) before its quantization, or None without outliers
    outlier_ptr,  # bytes (B, K): 1 if the channel stays float
    flag_ptr,  # one byte per OUTLIER_K channels: 1 if one of them stays float
    out_ptr,  # (M, N); split: (parts, M, N), int32 or, with outliers, fp32, not yet multiplied by w_scale
    M,
    N,
    K,
    rows_per_outlier,
    blocks_a_part,
    W_STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OUTLIER_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides K
    UPCAST: tl.constexpr,
):
    """One tile (BLOCK_N, BLOCK_M) of y^T, over one part of K."""
    tile_n, tile_m = _tile(tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), GROUP)
    n_left, m_left = N - tile_n * BLOCK_N, M - tile_m * BLOCK_M
    n, m, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    w_ptr += tile_n.to(tl.int64) * BLOCK_N * K
    x_ptr += tile_m.to(tl.int64) * BLOCK_M * K
    first = tl.program_id(1) * blocks_a_part
    last = tl.minimum(first + blocks_a_part, tl.cdiv(K, BLOCK_K))

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    w_at, x_at = n[:, None] * K + k[None, :], m[None, :] * K + k[:, None]
    for block in range(first, last):
        w_inside, x_inside = (n < n_left)[:, None], (m < m_left)[None, :]
        if not EVEN_K:
            left = K - block * BLOCK_K
            w_inside, x_inside = w_inside & (k < left)[None, :], x_inside & (k < left)[:, None]
        w = tl.load(w_ptr + block * BLOCK_K + w_at, mask=w_inside, other=0)
        x = tl.load(x_ptr + block * BLOCK_K + x_at, mask=x_inside, other=0)
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)

    value = acc
    rows = tile_m * BLOCK_M + m
    columns = tile_n * BLOCK_N + n
    if float_ptr is not None or not SPLIT:
        x_scale = tl.load(x_scale_ptr + rows, mask=m < m_left, other=0.0)
        value = value.to(tl.float32) * x_scale[None, :]
    if float_ptr is not None:
        float_ptr += tile_m.to(tl.int64) * BLOCK_M * K
        value = _add_outliers(
            value, w_ptr, float_ptr, outlier_ptr, flag_ptr, n, m, n_left, m_left, rows // rows_per_outlier, K,
            first * (BLOCK_K // OUTLIER_K), tl.minimum(last * (BLOCK_K // OUTLIER_K), tl.cdiv(K, OUTLIER_K)),
            OUTLIER_K, UPCAST,
        )  # fmt: skip
    inside = (n < n_left)[:, None] & (m < m_left)[None, :]
    if SPLIT:
        out_ptr += tl.program_id(1).to(tl.int64) * M * N
    else:
        value = _epilogue(value, w_scale_ptr, bias_ptr, columns[:, None], (n < n_left)[:, None], W_STEP)
    out_ptrs = out_ptr + rows[None, :].to(tl.int64) * N + columns[:, None]
    tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def reduce_kernel(
    part_ptr,  # (PARTS, M, N), the output of the matmul
    w_scale_ptr,
    x_scale_ptr,  # (M,) fp32, or None if the parts are already multiplied by it
    bias_ptr,
    out_ptr,  # (M, N)
    M,
    N,
    PARTS: tl.constexpr,
    W_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the parts of BLOCK outputs of one row, from the first part to the last, and dequantize the sum."""
    row = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = row.to(tl.int64) * N
    total = tl.zeros((BLOCK,), part_ptr.dtype.element_ty)
    for part in tl.static_range(PARTS):
        total += tl.load(part_ptr + part * M * N + start + n, mask=n < N, other=0)
    value = total.to(tl.float32)
    if x_scale_ptr is not None:
        value *= tl.load(x_scale_ptr + row)
    value = _epilogue(value, w_scale_ptr, bias_ptr, n, n < N, W_STEP)
    tl.store(out_ptr + start + n, value.to(out_ptr.dtype.element_ty), mask=n < N)
