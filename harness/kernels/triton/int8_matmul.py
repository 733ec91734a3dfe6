"""The launch of the int8 matmul: tile sizes, torch operator, and the cases that are compiled for inspection.

With few tiles, K is split over programs, which write to a scratch tensor; a second kernel sums it in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from harness.kernels.triton.case import Case
from harness.kernels.triton.int8_kernels import matmul_kernel, reduce_kernel
from harness.kernels.triton.tune import Config

BLOCK_K = 128  # bytes of a weight row: the width of the swizzle in shared memory
_OUTLIER_K = 64  # channels that share a flag
_MIN_BLOCKS = 4  # minimum of blocks of K per program, so that its loads can overlap
_GROUP = 8  # tiles of N that share one pass over x in L2
_REDUCE_BLOCK, _REDUCE_WARPS = 256, 2
_H100 = 132, 90  # multiprocessors, compute capability
# The interpreter computes bfloat16 dots wrongly, so it casts their operands to float32.
_INTERPRETED = bool(triton.knobs.runtime.interpret)


def _config(M: int, N: int, K: int, sm_count: int, arch: int) -> Config:
    """The launch for y (M, N) of x (M, K): small tiles if reading the weight takes longest, else large ones."""
    if M <= 64:
        config = Config(64, max(16, triton.next_power_of_2(M)), 1, num_warps=4, num_stages=5, path="split")
    elif M <= 128:
        config = Config(128, 64, 1, num_warps=4, num_stages=4, path="tensor")
    elif M <= 256 or arch < 90:
        config = Config(128, 128, 1, num_warps=8, num_stages=3, path="tensor")
    else:  # too large for the registers of an sm_80
        config = Config(128, 256, 1, num_warps=8, num_stages=4, path="tensor")
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    programs = 2 * sm_count if config.path == "split" else sm_count
    max_split = triton.cdiv(K, BLOCK_K) // _MIN_BLOCKS
    return replace(config, split_k=max(1, min(programs // tiles, max_split)))


def _narrow(config: Config) -> Config:
    """The same split of K with the smallest tile: a float32 dot on tensor cores has three times the operands."""
    return replace(config, block_n=64, block_m=16, num_warps=4, num_stages=5)


@dataclass(frozen=True)
class _Operands:
    """The tensors of one matmul: x (M, K), weight (N, K) and out (M, N)."""

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
    """y (M, N) in `dtype` from int8 codes (M, K) with x_scale (M,) and int8 weight (N, K) with w_scale (N or 1).

    Each row of `outliers` (B, K) bool applies to M / B consecutive rows: the marked channels are added from `floats`
    (M, K), and their codes must be 0.
    """
    out = codes.new_empty(codes.shape[0], weight.shape[0], dtype=dtype)
    if out.numel() == 0:
        return out
    operands = _Operands(codes, x_scale, weight, w_scale, bias, floats, outliers, out)
    config = _config(*operands.sizes, *_gpu(codes.device))
    if floats is not None and floats.dtype == torch.float32:
        config = _narrow(config)
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
    """Number of multiprocessors and compute capability; those of an H100 in the interpreter, without a GPU."""
    if device.type != "cuda":
        return _H100
    gpu = torch.cuda.get_device_properties(device)
    return gpu.multi_processor_count, 10 * gpu.major + gpu.minor


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
    integer = operands.floats is None
    parts = operands.codes.new_empty(config.split_k, M, N, dtype=torch.int32 if integer else torch.float32)
    _matmul(operands, config, parts)
    reduce_kernel[(triton.cdiv(N, _REDUCE_BLOCK), M)](
        parts,
        operands.w_scale,
        operands.x_scale if integer else None,
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
    """One byte per _OUTLIER_K channels: 1 if one of them is an outlier channel of any sequence."""
    padded = F.pad(outliers.any(0), (0, -outliers.shape[1] % _OUTLIER_K))
    return padded.view(-1, _OUTLIER_K).any(1).view(torch.uint8)


def cases() -> list[Case]:
    """Every tile size with and without outliers, in both 16-bit dtypes, and the sum of the parts."""
    sizes = {"small": (1, _H100), "middle": (128, _H100), "large": (4096, (108, 80)), "large_sm90": (4096, _H100)}
    configs = {label: _config(rows, 8192, 8192, *gpu) for label, (rows, gpu) in sizes.items()}
    matmul_cases = [
        _matmul_case(f"{kind}{'_outliers' if outliers else ''}_{label}", kind, config, outliers)
        for kind in ("bf16", "fp16")
        for outliers in (False, True)
        for label, config in configs.items()
    ]
    matmul_cases.append(_matmul_case("fp32_outliers_narrow", "fp32", _narrow(configs["large"]), outliers=True))
    return [*matmul_cases, _reduce_case("bf16_reduce", "bf16", configs["small"].split_k)]


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
