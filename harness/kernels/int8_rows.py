"""Rows of activations to int8 codes with a scale each, in one kernel: what comes before an int8 matmul.

The grid is that of `harness.core.grid` for symmetric 8-bit formats; codes are centred, so that 0 decodes to 0.0.
"""

# Triton reads its functions itself: their arguments have its types, and are as many as a kernel needs.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: PLR0913

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.kernels.case import Case

_ELEMENTS_A_WARP = 1024  # 32 a thread
_MAX_WARPS = 32


@triton.jit
def _divide(x, scale):
    """x / scale as IEEE rounds it, without a division of each value, which would take longer than to read it.

    The inverse's rounding shows in the last bit, and one Newton step puts that right (where fma rounds once, which it
    does not in the interpreter). On the full grid it counts: the largest value of a row lies half-way between codes.
    """
    inverse = tl.div_rn(1.0, scale)
    guess = tl.minimum(tl.maximum(x * inverse, -256.0), 256.0)  # of finite values: past every code, short of infinity
    rest = tl.fma(-guess, tl.full(x.shape, scale, tl.float32), x)
    return tl.fma(rest, tl.full(x.shape, inverse, tl.float32), guess)


@triton.jit(do_not_specialize=["rows_per_scale", "rows_per_outlier"])
def quantize_rows_kernel(
    x_ptr,  # (M, K) float
    given_ptr,  # scales (S,) fp32, of rows_per_scale rows each, or None to find one a row
    outlier_ptr,  # bytes (B, K), of rows_per_outlier rows each: 1 where the channel stays float; or None
    code_ptr,  # (M, K) int8
    scale_ptr,  # (M,) fp32
    K,
    rows_per_scale,
    rows_per_outlier,
    STEPS: tl.constexpr,  # codes from 0.0 to absmax
    BLOCK_K: tl.constexpr,
):
    """Quantize one row, read once and kept in registers."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    start = row.to(tl.int64) * K
    x = tl.load(x_ptr + start + k, mask=k < K, other=0.0).to(tl.float32)
    if outlier_ptr is not None:
        outlier = tl.load(outlier_ptr + (row // rows_per_outlier).to(tl.int64) * K + k, mask=k < K, other=0)
        x = tl.where(outlier != 0, 0.0, x)
    if given_ptr is None:
        scale = tl.div_rn(tl.max(tl.abs(x), 0), STEPS)
        scale = tl.where(scale > 0, scale, 1.0)
    else:
        scale = tl.load(given_ptr + row // rows_per_scale)
    scale = tl.maximum(scale, 1.1754943508222875e-38)  # the smallest normal number, whose inverse is finite
    level = tl.minimum(tl.maximum(_divide(x, scale), -128.0), 127.0)
    # Half to even: at 1.5 * 2^23 a float32 has no digits below one.
    level = (level + 12582912.0) - 12582912.0
    tl.store(code_ptr + start + k, level.to(tl.int8), mask=k < K)
    # A maximum passes over NaN, and no code stands for one: the scale carries it on.
    broken = tl.max((x != x).to(tl.int32), 0) > 0
    tl.store(scale_ptr + row, tl.where(broken, float("nan"), scale))


@torch.library.custom_op("ptqbench::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, steps: float, given: Tensor | None, outliers: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize the rows of x (M, K) symmetrically to int8, by absmax / `steps` or the scales that are given.

    `given` (S,) fp32 and `outliers` (B, K) bool belong to M / S and M / B rows in turn; channels marked in `outliers`
    get code 0 and have no part in the scale.
    Returns: codes (M, K) int8 in [-128, 127]; scale (M,) fp32, NaN for a row that holds one.
    """
    rows, columns = x.shape
    codes, scale = _outputs(x)
    if x.numel() == 0:
        return codes, scale.fill_(1)
    block = triton.next_power_of_2(columns)
    with torch.cuda.device_of(x):
        quantize_rows_kernel[(rows,)](
            x.contiguous(),
            given,
            None if outliers is None else outliers.view(torch.uint8),
            codes,
            scale,
            columns,
            1 if given is None else rows // len(given),
            1 if outliers is None else rows // len(outliers),
            STEPS=steps,
            BLOCK_K=block,
            num_warps=_warps(block),
        )
    return codes, scale


@quantize_rows.register_fake
def _(x: Tensor, steps: float, given: Tensor | None, outliers: Tensor | None) -> tuple[Tensor, Tensor]:
    return _outputs(x)


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def _warps(block: int) -> int:
    return min(max(block // _ELEMENTS_A_WARP, 1), _MAX_WARPS)


def cases() -> list[Case]:
    """A row of 4096 and one of 28672, in both 16-bit dtypes, and with outliers."""
    return [
        *(_case(f"{kind}_quantize_{size}", kind, size) for kind in ("bf16", "fp16") for size in (4096, 28672)),
        _case("bf16_outliers_quantize_8192", "bf16", 8192, outliers=True),
    ]


def _case(name: str, kind: str, size: int, outliers: bool = False) -> Case:
    block = triton.next_power_of_2(size)
    signature = {
        "x_ptr": f"*{kind}",
        "given_ptr": "constexpr",
        "outlier_ptr": "*u8" if outliers else "constexpr",
        "code_ptr": "*i8",
        "scale_ptr": "*fp32",
        "K": "i32",
        "rows_per_scale": "i32",
        "rows_per_outlier": "i32",
        "STEPS": "constexpr",
        "BLOCK_K": "constexpr",
    }
    constants: dict[str, object] = {"given_ptr": None, "STEPS": 127.0, "BLOCK_K": block}
    if not outliers:
        constants["outlier_ptr"] = None
    return Case(name, quantize_rows_kernel, signature, constants, _warps(block), 3)
