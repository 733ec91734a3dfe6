"""Quantize rows of activations to int8 codes with one scale per row, in one kernel, before an int8 matmul.

The grid is that of `harness.core.formats.integer` for symmetric formats of 8 bits. Codes are centred: 0 decodes to 0.0.
"""

# Triton parses these functions itself: arguments have triton types, and a kernel needs many of them.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: PLR0913

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.kernels.triton.case import Case

_ELEMENTS_A_WARP = 1024  # 32 per thread
_MAX_WARPS = 32


@triton.jit
def _divide(x, scale):
    """x / scale with IEEE rounding, without one division per value, which would take longer than reading x.

    The rounded inverse makes the last bit wrong, and one Newton step corrects it (if fma rounds once, which it does not
    in the interpreter). This matters on the full grid, where the largest value of a row is half-way between two codes.
    """
    inverse = tl.div_rn(1.0, scale)
    guess = tl.minimum(tl.maximum(x * inverse, -256.0), 256.0)  # beyond every code, and finite
    remainder = tl.fma(-guess, tl.full(x.shape, scale, tl.float32), x)
    return tl.fma(remainder, tl.full(x.shape, inverse, tl.float32), guess)


@triton.jit(do_not_specialize=["rows_per_scale", "rows_per_outlier"])
def quantize_rows_kernel(
    x_ptr,  # (M, K) float
    preset_ptr,  # scales (S,) fp32 of rows_per_scale rows each, or None: absmax of each row / STEPS
    outlier_ptr,  # bytes (B, K) of rows_per_outlier rows each: 1 if the channel stays float; or None
    code_ptr,  # (M, K) int8
    scale_ptr,  # (M,) fp32
    K,
    rows_per_scale,
    rows_per_outlier,
    STEPS: tl.constexpr,  # quantization steps from 0.0 to absmax
    BLOCK_K: tl.constexpr,
):
    """Quantize one row. It is read once and stays in registers."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    start = row.to(tl.int64) * K
    x = tl.load(x_ptr + start + k, mask=k < K, other=0.0).to(tl.float32)
    if outlier_ptr is not None:
        outlier = tl.load(outlier_ptr + (row // rows_per_outlier).to(tl.int64) * K + k, mask=k < K, other=0)
        x = tl.where(outlier != 0, 0.0, x)
    if preset_ptr is None:
        scale = tl.div_rn(tl.max(tl.abs(x), 0), STEPS)
        scale = tl.where(scale > 0, scale, 1.0)
    else:
        scale = tl.load(preset_ptr + row // rows_per_scale)
    scale = tl.maximum(scale, 1.1754943508222875e-38)  # the smallest normal number: its inverse is finite
    level = tl.minimum(tl.maximum(_divide(x, scale), -128.0), 127.0)
    # Round half to even: near 1.5 * 2^23, a float32 has no fractional digits.
    level = (level + 12582912.0) - 12582912.0
    tl.store(code_ptr + start + k, level.to(tl.int8), mask=k < K)
    # A maximum ignores NaN, and no code represents it: the scale of the row becomes NaN instead.
    has_nan = tl.max((x != x).to(tl.int32), 0) > 0
    tl.store(scale_ptr + row, tl.where(has_nan, float("nan"), scale))


@torch.library.custom_op("ptqbench::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, steps: float, preset: Tensor | None, outliers: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize the rows of x (M, K) symmetrically to int8, with the scale absmax / `steps` or the scales in `preset`.

    Each entry of `preset` (S,) fp32 applies to M / S consecutive rows, each row of `outliers` (B, K) bool to M / B.
    Channels marked in `outliers` get code 0 and do not influence the scale.
    Returns: codes (M, K) int8 in [-128, 127]; scale (M,) fp32, NaN for a row that contains NaN.
    """
    rows, columns = x.shape
    codes, scale = _outputs(x)
    if x.numel() == 0:
        return codes, scale.fill_(1)
    block = triton.next_power_of_2(columns)
    with torch.cuda.device_of(x):
        quantize_rows_kernel[(rows,)](
            x.contiguous(),
            preset,
            None if outliers is None else outliers.view(torch.uint8),
            codes,
            scale,
            columns,
            1 if preset is None else rows // len(preset),
            1 if outliers is None else rows // len(outliers),
            STEPS=steps,
            BLOCK_K=block,
            num_warps=_warps(block),
        )
    return codes, scale


@quantize_rows.register_fake
def _(x: Tensor, steps: float, preset: Tensor | None, outliers: Tensor | None) -> tuple[Tensor, Tensor]:
    return _outputs(x)


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def _warps(block: int) -> int:
    return min(max(block // _ELEMENTS_A_WARP, 1), _MAX_WARPS)


def cases() -> list[Case]:
    """Rows of 4096 and 28672 values in both 16-bit dtypes, and a row of 8192 with outliers."""
    return [
        *(_case(f"{kind}_quantize_{size}", kind, size) for kind in ("bf16", "fp16") for size in (4096, 28672)),
        _case("bf16_outliers_quantize_8192", "bf16", 8192, outliers=True),
    ]


def _case(name: str, kind: str, size: int, outliers: bool = False) -> Case:
    block = triton.next_power_of_2(size)
    signature = {
        "x_ptr": f"*{kind}",
        "preset_ptr": "constexpr",
        "outlier_ptr": "*u8" if outliers else "constexpr",
        "code_ptr": "*i8",
        "scale_ptr": "*fp32",
        "K": "i32",
        "rows_per_scale": "i32",
        "rows_per_outlier": "i32",
        "STEPS": "constexpr",
        "BLOCK_K": "constexpr",
    }
    constants: dict[str, object] = {"preset_ptr": None, "STEPS": 127.0, "BLOCK_K": block}
    if not outliers:
        constants["outlier_ptr"] = None
    return Case(name, quantize_rows_kernel, signature, constants, _warps(block), 3)
