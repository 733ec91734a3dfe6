"""Weight-only int4 and int8 matmul with 16-bit activations: launchers, torch operators and the module.

Three paths, chosen by `tune` or given: `split` for few rows, K shared among programs whose sums go to an fp32
scratch that a second kernel adds up in fixed order; `tensor` for more; `dequantize` where decoding the weight once
and the library's matmul are quicker. No path synchronises, and the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from harness.core.qtensor import IntQTensor
from harness.core.scheme import WeightFormat
from harness.kernels import tiles, tune
from harness.kernels.base import Kernel
from harness.kernels.case import Case
from harness.kernels.matmul import dequantize_kernel, matmul_kernel, reduce_kernel
from harness.kernels.tiles import Layout
from harness.kernels.tune import Config

_DTYPES = (torch.float16, torch.bfloat16)
_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_REDUCE_BLOCK = 1024


def matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    layout: Layout,
    config: Config,
) -> Tensor:  # noqa: PLR0913 - a matmul's operands
    """y (M, N) = x W^T + b of contiguous x (M, K) and what `tiles` packed, as `config` says."""
    if config.path == "dequantize":
        weight = dequantize(packed, scale, zero_point, layout, x.dtype)
        return F.linear(x, weight, bias)
    M, (N, K) = x.shape[0], (layout.N, layout.K)
    y = x.new_empty(M, N)
    whole = config.split_k == 1
    out = y if whole else x.new_empty(config.split_k, M, N, dtype=torch.float32)
    grid = (triton.cdiv(N, config.block_n) * triton.cdiv(M, config.block_m), config.split_k)
    matmul_kernel[grid](
        x,
        packed.view(torch.uint16),
        scale,
        scale if zero_point is None else zero_point,
        x if bias is None else bias,
        out,
        M,
        N,
        K,
        layout.groups,
        **_format(layout, zero_point),
        EVEN_K=layout.padded_K == K,
        BIAS=whole and bias is not None,
        HOIST=_hoists(config, zero_point),
        BLOCK_N=config.block_n,
        BLOCK_M=config.block_m,
        SPLIT_K=config.split_k,
        WORK=_work(x.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if not whole:
        blocks = (triton.cdiv(M * N, _REDUCE_BLOCK),)
        reduce_kernel[blocks](
            out, y if bias is None else bias, y, M * N, N, config.split_k, bias is not None, _REDUCE_BLOCK
        )
    return y


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor | None, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) in `dtype` from what `tiles` packed, through fp32."""
    out = packed.new_empty(layout.N, layout.K, dtype=dtype)
    grid = (layout.padded_N // tiles.ROWS, layout.padded_K // (2 * layout.half))
    zero = scale if zero_point is None else zero_point
    dequantize_kernel[grid](
        packed.view(torch.uint16), scale, zero, out, layout.N, layout.K, layout.groups, **_format(layout, zero_point)
    )
    return out


def _format(layout: Layout, zero_point: Tensor | None) -> dict[str, object]:
    """The kernels' constants that say how a weight is stored."""
    kind = "none" if zero_point is None else "float" if zero_point.is_floating_point() else "integer"
    group = layout.group_size if layout.groups > 1 else 0
    return {
        "BITS": layout.bits,
        "HALF": layout.half,
        "GROUP": group,
        "ZERO": kind,
        "ASM": not triton.knobs.runtime.interpret,
    }


def _work(dtype: torch.dtype) -> object:
    """Triton's name of what weights are computed in."""
    if dtype == torch.float16:
        return tl.float16
    return tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16


def _hoists(config: Config, zero_point: Tensor | None) -> bool:
    """Whether groups are scaled after the dot: not for float zero points, which no 16-bit code less them holds."""
    return config.path == "split" and not (zero_point is not None and zero_point.is_floating_point())


@torch.library.custom_op("ptqbench::weight_only_linear", mutates_args=())
def weight_only_linear(  # noqa: PLR0913 - torch operators take tensors and numbers alone
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    N: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """Y (M, N) = x W^T + b of x (M, K), with the configuration that `tune` chooses."""
    M, K = x.shape
    layout = Layout(N, K, bits, group_size)
    if M == 0:
        return x.new_empty(0, N)
    config = tune.choose(_name(bits), M, N, K, group_size, x.dtype, x.device)
    return matmul(x.contiguous(), packed, scale, zero_point, bias, layout, config)


@weight_only_linear.register_fake
def _(  # noqa: PLR0913
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    N: int,
    bits: int,
    group_size: int,
) -> Tensor:
    return x.new_empty(x.shape[0], N)


def _name(bits: int) -> str:
    return f"triton_w{bits}a16"


def supports(weight: IntQTensor, dtype: torch.dtype) -> bool:
    """Whether `TritonInt` can run a weight with activations of `dtype`."""
    group_size = _group_size(weight)
    fits = group_size == weight.shape[1] or group_size % 16 == 0
    return type(weight) is IntQTensor and weight.fmt.bits in (4, 8) and dtype in _DTYPES and fits


def _group_size(weight: IntQTensor) -> int:
    return weight.shape[1] // weight.scale.shape[1]


class TritonInt(Kernel):
    """A weight of int4 or int8 codes that Triton multiplies with fp16 or bf16 inputs."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, weight: IntQTensor, dtype: torch.dtype) -> None:
        """Pack `weight` for activations of `dtype`.

        Raises: ValueError if `supports` says no.
        """
        super().__init__(weight.shape)
        if not supports(weight, dtype):
            raise ValueError(
                f"bits={weight.fmt.bits} in groups of {_group_size(weight)} with {dtype} activations has no Triton "
                "kernel; expected 4 or 8 bits, groups of a multiple of 16 or whole rows, float16 or bfloat16"
            )
        self.layout = Layout(*weight.shape, bits=weight.fmt.bits, group_size=_group_size(weight))
        self.name = _name(weight.fmt.bits)
        self.dtype = dtype
        self.register_buffer("packed", tiles.pack_codes(weight.codes, self.layout))
        self.register_buffer("scale", tiles.pack_params(weight.scale, self.layout))
        self.register_buffer("zero_point", self._pack_zero_point(weight))

    def _pack_zero_point(self, weight: IntQTensor) -> Tensor | None:
        fmt: WeightFormat = weight.fmt
        if weight.zero_point is None:
            return None
        if fmt.zero_point == "float":
            return tiles.pack_params(weight.zero_point, self.layout)
        return tiles.pack_zero_points(weight.zero_points().to(torch.uint8), self.layout)

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        N, K = self.shape
        y = weight_only_linear(
            inputs.reshape(-1, K),
            self.packed,
            self.scale,
            self.zero_point,
            bias,
            N,
            self.layout.bits,
            self.layout.group_size,
        )
        return y.view(*inputs.shape[:-1], N)


def cases() -> list[Case]:
    """Variants worth looking at: few rows and many, both dtypes, the group sizes, and the decoding kernel."""
    few = Config(64, 16, 2, num_warps=4, num_stages=5, path="split")
    middle = Config(64, 64, 1, num_warps=4, num_stages=4, path="tensor")
    many = Config(128, 128, 1, num_warps=8, num_stages=3, path="tensor")
    found = [
        _matmul_case(dtype, 4, group_size, config)
        for dtype in _DTYPES
        for group_size in (128, 64, 32)
        for config in (few, middle, many)
    ]
    found += [_matmul_case(torch.bfloat16, 8, 4096, config) for config in (few, many)]
    return found + [_dequantize_case(dtype) for dtype in _DTYPES]


def _matmul_case(dtype: torch.dtype, bits: int, group_size: int, config: Config) -> Case:
    layout = Layout(4096, 4096, bits, group_size)
    zero_point = torch.empty(0, dtype=torch.uint8)
    constexprs: dict[str, object] = {
        **_format(layout, zero_point),
        "ASM": True,
        "EVEN_K": True,
        "BIAS": False,
        "HOIST": _hoists(config, zero_point),
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "SPLIT_K": config.split_k,
        "WORK": tl.float16 if dtype == torch.float16 else tl.bfloat16,
    }
    kind = _POINTERS[dtype]
    types = {"x": kind, "packed": "*u16", "scale": "*fp16", "zero": "*u8", "bias": kind}
    types |= {"out": "*fp32" if config.split_k > 1 else kind, "M": "i32", "N": "i32", "K": "i32", "groups": "i32"}
    name = f"{_name(bits)} {config.path} {config.block_n}x{config.block_m} {kind[1:]} group {group_size}"
    signature = {argument: types.get(argument, "constexpr") for argument in matmul_kernel.arg_names}
    return Case(name, matmul_kernel, signature, constexprs, config.num_warps, config.num_stages)


def _dequantize_case(dtype: torch.dtype) -> Case:
    constexprs = {**_format(Layout(4096, 4096, 4, 128), torch.empty(0, dtype=torch.uint8)), "ASM": True}
    types = {"packed": "*u16", "scale": "*fp16", "zero": "*u8", "out": _POINTERS[dtype]}
    types |= {"N": "i32", "K": "i32", "groups": "i32"}
    signature = {argument: types.get(argument, "constexpr") for argument in dequantize_kernel.arg_names}
    return Case(f"dequantize {_POINTERS[dtype][1:]}", dequantize_kernel, signature, constexprs, 4, 2)
