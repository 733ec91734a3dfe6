"""int8 x int8 matmul with its dequantizing epilogue: y = codes_x codes_w^T * scale_x * scale_w + bias.

The weight (N, K) is the left operand of the dot, so that its N fills the rows of the tensor core however few rows M
the input has. With few tiles, K is split over blocks into a scratch that a second kernel sums in fixed order.

Outlier channels (LLM.int8()) have code 0 in x and are added as floats in a second walk over K, which skips every
block of K whose flag says that it has none. It starts from acc * scale_x, so that one accumulator serves both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from harness.kernels.case import Case

BLOCK_K = 128  # bytes of a row of weights, the width of the swizzle in shared memory
_OUTLIER_K = 64  # channels that share a flag
_MIN_BLOCKS = 4  # of K for a program, so that its loads have something to overlap with
_GROUP = 8  # tiles of N that share one sweep of x out of L2
_REDUCE_BLOCK, _REDUCE_WARPS = 256, 2
_H100 = 132, 90  # multiprocessors, compute capability
# The interpreter's dot of bfloat16 is wrong.
_INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Config:
    """How a matmul is launched.

    block_n, block_m   rows of the weight and of the input that a program computes
    split_k            programs that share the sum over K
    path               "split" (memory-bound) or "tensor" (tensor cores busy)
    """

    block_n: int
    block_m: int
    split_k: int
    num_warps: int
    num_stages: int
    path: str


def _config(M: int, N: int, K: int, sm_count: int, arch: int) -> Config:
    """The launch for y (M, N) of x (M, K): small tiles where the weights' bytes count, large ones where the dots do."""
    if M <= 64:
        found = Config(64, max(16, triton.next_power_of_2(M)), 1, num_warps=4, num_stages=5, path="split")
    elif M <= 128:
        found = Config(128, 64, 1, num_warps=4, num_stages=4, path="tensor")
    elif M <= 256 or arch < 90:
        found = Config(128, 128, 1, num_warps=8, num_stages=3, path="tensor")
    else:  # too large for the registers of an sm_80
        found = Config(128, 256, 1, num_warps=8, num_stages=4, path="tensor")
    tiles = triton.cdiv(M, found.block_m) * triton.cdiv(N, found.block_n)
    programs = 2 * sm_count if found.path == "split" else sm_count
    most = triton.cdiv(K, BLOCK_K) // _MIN_BLOCKS
    return replace(found, split_k=max(1, min(programs // tiles, most)))


@triton.jit
def _tile(tiles_n, tiles_m, GROUP: tl.constexpr):
    """Indices of this program's tile, in an order that goes over all m before it leaves a group of n."""
    program = tl.program_id(0)
    width = GROUP * tiles_m
    first = program // width * GROUP
    rows = tl.minimum(tiles_n - first, GROUP)
    return first + program % width % rows, program % width // rows


@triton.jit
def _epilogue(value, w_scale_ptr, bias_ptr, n, inside, W_STEP: tl.constexpr):
    """value * w_scale + bias; a step of 0 makes one scale serve all n."""
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

    The pointers are at the tile's first rows, of which n_left and m_left exist; `sequence` (m,) is the row of the marks.
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
            acc = tl.dot(w.to(dtype), x, acc, input_precision="tf32x3")  # of float32 alone
    return acc


@triton.jit
def matmul_kernel(
    w_ptr,  # codes (N, K) int8
    x_ptr,  # codes (M, K) int8
    w_scale_ptr,  # (N,), or (1,) with W_STEP 0
    x_scale_ptr,  # (M,) fp32
    bias_ptr,  # (N,) or None
    float_ptr,  # x (M, K) before its quantization, or None if no outliers are looked for
    outlier_ptr,  # bytes (B, K): 1 where the channel stays float
    flag_ptr,  # bytes, one each OUTLIER_K channels: 1 where it has such a channel
    out_ptr,  # (M, N); split: (parts, M, N), int32 or, with outliers, fp32 that w_scale is yet to multiply
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


@triton.jit
def reduce_kernel(
    part_ptr,  # (PARTS, M, N), as the matmul left it
    w_scale_ptr,
    x_scale_ptr,  # (M,) fp32, or None where the parts hold it already
    bias_ptr,
    out_ptr,  # (M, N)
    M,
    N,
    PARTS: tl.constexpr,
    W_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the parts of BLOCK outputs of one row, from the first to the last, and dequantize."""
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


@dataclass(frozen=True)
class _Operands:
    """What one matmul reads and writes: x (M, K), weight (N, K), out (M, N)."""

    codes: Tensor
    x_scale: Tensor
    weight: Tensor
    w_scale: Tensor
    bias: Tensor | None
    floats: Tensor | None
    outliers: Tensor | None
    out: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        return self.codes.shape[0], self.weight.shape[0], self.codes.shape[1]

    @property
    def w_step(self) -> int:
        return 1 if self.w_scale.numel() > 1 else 0


@torch.library.custom_op("ptqbench::int8_matmul", mutates_args=())
def int8_matmul(  # noqa: PLR0913
    codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    floats: Tensor | None = None,
    outliers: Tensor | None = None,
) -> Tensor:
    """y (M, N) of `dtype` from int8 codes (M, K) with x_scale (M,) and int8 weight (N, K) with w_scale (N or 1).

    With `floats` (M, K) and `outliers` (B, K) bool, channels marked in the row's own M / B rows add their floats;
    their codes are to be 0.
    """
    out = codes.new_empty(codes.shape[0], weight.shape[0], dtype=dtype)
    if out.numel() == 0:
        return out
    operands = _Operands(codes, x_scale, weight, w_scale, bias, floats, outliers, out)
    config = _config(*operands.sizes, *_gpu(codes.device))
    with torch.cuda.device_of(codes):
        if config.split_k == 1:
            _matmul(operands, config, out)
        else:
            _split_matmul(operands, config)
    return out


@int8_matmul.register_fake
def _(  # noqa: PLR0913
    codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    floats: Tensor | None = None,
    outliers: Tensor | None = None,
) -> Tensor:
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=dtype)


@lru_cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Multiprocessors and compute capability; those of an H100 where there is no GPU and the interpreter runs."""
    if device.type != "cuda":
        return _H100
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, 10 * found.major + found.minor


def _matmul(operands: _Operands, config: Config, out: Tensor) -> None:
    M, N, K = operands.sizes
    blocks = triton.cdiv(K, BLOCK_K)
    outliers = operands.outliers
    matmul_kernel[(triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n), config.split_k)](
        operands.weight,
        operands.codes,
        operands.w_scale,
        operands.x_scale,
        operands.bias,
        operands.floats,
        None if outliers is None else outliers.view(torch.uint8),
        None if outliers is None else _flags(outliers),
        out,
        M,
        N,
        K,
        1 if outliers is None else M // len(outliers),
        triton.cdiv(blocks, config.split_k),
        W_STEP=operands.w_step,
        BLOCK_N=config.block_n,
        BLOCK_M=config.block_m,
        BLOCK_K=BLOCK_K,
        OUTLIER_K=_OUTLIER_K,
        GROUP=_GROUP,
        SPLIT=config.split_k > 1,
        EVEN_K=K % BLOCK_K == 0,
        UPCAST=_INTERPRETED,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _split_matmul(operands: _Operands, config: Config) -> None:
    M, N, _ = operands.sizes
    whole = operands.floats is None
    parts = operands.codes.new_empty(config.split_k, M, N, dtype=torch.int32 if whole else torch.float32)
    _matmul(operands, config, parts)
    reduce_kernel[(triton.cdiv(N, _REDUCE_BLOCK), M)](
        parts,
        operands.w_scale,
        operands.x_scale if whole else None,
        operands.bias,
        operands.out,
        M,
        N,
        PARTS=config.split_k,
        W_STEP=operands.w_step,
        BLOCK=_REDUCE_BLOCK,
        num_warps=_REDUCE_WARPS,
    )


def _flags(outliers: Tensor) -> Tensor:
    """Bytes, one each _OUTLIER_K channels: 1 where any sequence has an outlier channel in it."""
    padded = F.pad(outliers.any(0), (0, -outliers.shape[1] % _OUTLIER_K))
    return padded.view(-1, _OUTLIER_K).any(1).view(torch.uint8)


def cases() -> list[Case]:
    """Every size of tile with and without outliers, in both 16-bit dtypes, and the sum of the parts."""
    sizes = {"small": (1, _H100), "middle": (128, _H100), "large": (4096, (108, 80)), "large_sm90": (4096, _H100)}
    configs = {label: _config(rows, 8192, 8192, *gpu) for label, (rows, gpu) in sizes.items()}
    found = [
        _matmul_case(f"{kind}{'_outliers' if outliers else ''}_{label}", kind, config, outliers)
        for kind in ("bf16", "fp16")
        for outliers in (False, True)
        for label, config in configs.items()
    ]
    return [*found, _reduce_case("bf16_reduce", "bf16", configs["small"].split_k)]


def _matmul_case(name: str, kind: str, config: Config, outliers: bool) -> Case:
    split = config.split_k > 1
    part = "fp32" if outliers else "i32"
    types = {
        "w_ptr": "*i8",
        "x_ptr": "*i8",
        "w_scale_ptr": "*fp16",
        "x_scale_ptr": "*fp32",
        "bias_ptr": f"*{kind}",
        "float_ptr": f"*{kind}",
        "outlier_ptr": "*u8",
        "flag_ptr": "*u8",
        "out_ptr": f"*{part if split else kind}",
        **dict.fromkeys(("M", "N", "K", "rows_per_outlier", "blocks_a_part"), "i32"),
    }
    constants: dict[str, object] = {
        "W_STEP": 1,
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "BLOCK_K": BLOCK_K,
        "OUTLIER_K": _OUTLIER_K,
        "GROUP": _GROUP,
        "SPLIT": split,
        "EVEN_K": True,
        "UPCAST": False,
    }
    if not outliers:
        constants |= dict.fromkeys(("float_ptr", "outlier_ptr", "flag_ptr"))
    signature = types | dict.fromkeys(constants, "constexpr")
    return Case(name, matmul_kernel, signature, constants, config.num_warps, config.num_stages)


def _reduce_case(name: str, kind: str, parts: int) -> Case:
    types = {
        "part_ptr": "*i32",
        "w_scale_ptr": "*fp16",
        "x_scale_ptr": "*fp32",
        "bias_ptr": f"*{kind}",
        "out_ptr": f"*{kind}",
        "M": "i32",
        "N": "i32",
    }
    constants: dict[str, object] = {"PARTS": parts, "W_STEP": 1, "BLOCK": _REDUCE_BLOCK}
    return Case(name, reduce_kernel, types | dict.fromkeys(constants, "constexpr"), constants, _REDUCE_WARPS, 3)
