"""Weight-only matmul with 16-bit activations: launchers, torch operator, and the kernel module of every format.

`tune` or the caller chooses one of three paths. `split` is for few rows: several programs share K and write their sums
to an fp32 scratch tensor, which a second kernel adds in a fixed order. `tensor` is for more rows. `dequantize` decodes
the weight once and calls the library's matmul; it is for the numbers of rows for which this is faster. No path
synchronises, and the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from harness.core.formats.elements import Element, element
from harness.kernels.base import Kernel
from harness.kernels.triton import tiles, tune
from harness.kernels.triton.case import Case
from harness.kernels.triton.decode import INTEGERS
from harness.kernels.triton.matmul import dequantize_kernel, matmul_kernel, reduce_kernel
from harness.kernels.triton.tiles import Layout, Packed
from harness.kernels.triton.tune import Config

DTYPES = (torch.float16, torch.bfloat16)
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.float8_e8m0fnu: "*u8",
    torch.float8_e4m3fn: "*u8",
}
_REDUCE_BLOCK = 1024


def matmul(x: Tensor, weight: Packed, bias: Tensor | None, config: Config) -> Tensor:
    """Compute y (M, N) = x W^T + b for contiguous x (M, K), with the launch `config`."""
    if config.path == "dequantize":
        return F.linear(x, dequantize(weight, x.dtype), bias)
    M, layout = x.shape[0], weight.layout
    y = x.new_empty(M, layout.N)
    unsplit = config.split_k == 1
    out = y if unsplit else x.new_empty(config.split_k, M, layout.N, dtype=torch.float32)
    grid = (triton.cdiv(layout.N, config.block_n) * triton.cdiv(M, config.block_m), config.split_k)
    matmul_kernel[grid](
        x,
        *_stored(weight),
        x if bias is None else bias,
        out,
        M,
        layout.N,
        layout.K,
        layout.groups,
        **_format(weight),
        **_tiling(config, weight, x.dtype),
        EVEN_K=layout.padded_K == layout.K,
        BIAS=unsplit and bias is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y if unsplit else _reduce(out, bias, y)


def _reduce(parts: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """Fill y (M, N) with the sum of `parts` (SPLIT_K, M, N) and the bias, and return it."""
    grid = (triton.cdiv(y.numel(), _REDUCE_BLOCK),)
    bias_argument = y if bias is None else bias  # the kernel does not read y
    reduce_kernel[grid](parts, bias_argument, y, y.numel(), y.shape[1], len(parts), bias is not None, _REDUCE_BLOCK)
    return y


def dequantize(weight: Packed, dtype: torch.dtype) -> Tensor:
    """The decoded weight (N, K) in `dtype`, computed in fp32."""
    layout = weight.layout
    out = weight.codes.new_empty(layout.N, layout.K, dtype=dtype)
    grid = (layout.padded_N // tiles.ROWS, layout.padded_K // (2 * layout.half))
    dequantize_kernel[grid](*_stored(weight), out, layout.N, layout.K, layout.groups, **_format(weight))
    return out


def _stored(weight: Packed) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The arguments of the kernels that hold a weight: words, scales, zero points, the scale of the whole tensor."""
    scale = weight.scale.view(torch.uint8) if weight.scale.itemsize == 1 else weight.scale
    zero = scale if weight.zero_point is None else weight.zero_point  # the kernel does not read it then
    return weight.codes.view(torch.uint16), scale, zero, weight.tensor_scale


def _format(weight: Packed) -> dict[str, object]:
    """The compile-time constants of the kernels that describe how a weight is stored."""
    layout, kind = weight.layout, weight.element
    group = layout.group_size if layout.groups > 1 else 0
    mantissa, exponent = (INTEGERS.value, 0) if kind is None else (kind.mantissa, kind.exponent)
    compiled = not triton.knobs.runtime.interpret
    codes = {"BITS": layout.bits, "MANTISSA": mantissa, "EXPONENT": exponent, "HALF": layout.half, "GROUP": group}
    return {**codes, "ZERO": weight.zero_kind, "SCALE": weight.scale_kind, "ASM": compiled}


def _tiling(config: Config, weight: Packed, dtype: torch.dtype) -> dict[str, object]:
    """The compile-time constants of the matmul that describe its launch.

    Scales of whole rows, and with few rows of x those of groups, are applied after the dot, except with float zero
    points: 16 bits cannot represent a code minus a float zero point exactly.
    """
    work = tl.float16 if dtype == torch.float16 else tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16
    blocks = {"BLOCK_N": config.block_n, "BLOCK_M": config.block_m, "SPLIT_K": config.split_k}
    after = config.path == "split" or weight.layout.groups == 1
    return {**blocks, "HOIST": after and weight.zero_kind != "float", "WORK": work}


@torch.library.custom_op("ptqbench::weight_only_linear", mutates_args=())
def weight_only_linear(  # noqa: PLR0913 - torch operators take only tensors, numbers and strings
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    N: int,
    codes: str,
    group_size: int,
) -> Tensor:
    """Compute y (M, N) = x W^T + b for x (M, K), with the configuration that `tune` chooses.

    `codes` says what a code is: int4, int8, or the name of a small float.
    """
    M, K = x.shape
    kind = element_of(codes)
    weight = Packed(packed, scale, zero_point, Layout(N, K, width(codes), group_size), kind, tensor_scale)
    if M == 0:
        return x.new_empty(0, N)
    config = tune.choose(name_of(codes), M, N, K, group_size, x.dtype, x.device)
    return matmul(x.contiguous(), weight, bias, config)


@weight_only_linear.register_fake
def _(  # noqa: PLR0913
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    N: int,
    codes: str,
    group_size: int,
) -> Tensor:
    return x.new_empty(x.shape[0], N)


def element_of(codes: str) -> Element | None:
    """The small float called `codes`; None for int4 and int8."""
    return None if codes.startswith("int") else element(codes)


def width(codes: str) -> int:
    """Bits of a code in a tile, 4 or 8."""
    kind = element_of(codes)
    return int(codes.removeprefix("int")) if kind is None else 4 if kind.bits <= 4 else 8


def name_of(codes: str) -> str:
    """The name of the kernel of these codes, in records and in the cache of `tune`."""
    return f"triton_w{width(codes)}a16" if element_of(codes) is None else f"triton_{codes}"


class WeightOnly(Kernel):
    """A weight in tiles, for Triton's matmul with inputs in `dtype`, fp16 or bf16."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    tensor_scale: Tensor | None

    def __init__(self, codes: str, weight: Packed, dtype: torch.dtype) -> None:
        """`weight` has codes of the kind `codes`."""
        super().__init__((weight.layout.N, weight.layout.K))
        self.codes, self.layout, self.dtype, self.name = codes, weight.layout, dtype, name_of(codes)
        self.register_buffer("packed", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        self.register_buffer("tensor_scale", weight.tensor_scale)

    def weight(self) -> Packed:
        """The buffers in the form that the kernels read."""
        stored = (self.packed, self.scale, self.zero_point)
        return Packed(*stored, self.layout, element_of(self.codes), self.tensor_scale)

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        N, K = self.shape
        rows, buffers = inputs.reshape(-1, K), (self.packed, self.scale, self.zero_point, self.tensor_scale)
        y: Tensor = weight_only_linear(rows, *buffers, bias, N, self.codes, self.layout.group_size)
        return y.view(*inputs.shape[:-1], N)


def candidates(M: int) -> list[Config]:
    """Configurations that `autotune` tries for M rows."""
    parts = (1, 2, 4, 8)
    if M <= 32:
        tiles_and_warps = ((64, 4), (128, 8))
        stages = (4, 6, 8)
        return [Config(n, max(tune.bucket(M), 16), k, w, s) for n, w in tiles_and_warps for k in parts for s in stages]
    shapes = [(64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8)]
    tensor = [Config(n, m, k, w, s, "tensor") for n, m, w in shapes for k in parts[:2] for s in (2, 3, 4)]
    return [*tensor, Config(path="dequantize")]


def autotune(kernel: WeightOnly, M: int) -> Config:
    """Time the candidates for M input rows and store the fastest one for all weights of this shape and format."""
    weight, (N, K) = kernel.weight(), kernel.shape
    x = torch.randn(M, K, device=weight.codes.device, dtype=kernel.dtype)
    problem = tune.Problem(kernel.name, M, N, K, weight.layout.group_size, kernel.dtype)

    def run(config: Config) -> None:
        matmul(x, weight, None, config)

    return tune.autotune(problem, candidates(M), run, x.device)


def cases_of(codes: str, weight: Packed, dtypes: Sequence[torch.dtype], configs: Sequence[Config]) -> list[Case]:
    """Variants to inspect of the kernels for weights that are stored as `weight`, whose tensors may be empty."""
    return [_case(codes, weight, dtype, config) for dtype in dtypes for config in configs]


def _case(codes: str, weight: Packed, dtype: torch.dtype, config: Config) -> Case:
    layout, pointer = weight.layout, _POINTERS[dtype]
    zero = weight.scale if weight.zero_point is None else weight.zero_point
    types = {"packed": "*u16", "scale": _POINTERS[weight.scale.dtype], "zero": _POINTERS[zero.dtype]}
    types |= {"x": pointer, "bias": pointer, "out": pointer} | dict.fromkeys(("M", "N", "K", "groups"), "i32")
    constexprs: dict[str, object] = {**_format(weight), "ASM": True}
    if weight.tensor_scale is None:
        constexprs["whole"] = None
    else:
        types["whole"] = "*fp32"
    kernel, name = dequantize_kernel, f"{codes} dequantize {pointer[1:]} group {layout.group_size}"
    if config.path != "dequantize":
        work = tl.float16 if dtype == torch.float16 else tl.bfloat16
        constexprs |= {**_tiling(config, weight, dtype), "EVEN_K": True, "BIAS": False, "WORK": work}
        types["out"] = "*fp32" if config.split_k > 1 else pointer
        tile = f"{config.block_n}x{config.block_m}"
        kernel, name = matmul_kernel, f"{codes} {config.path} {tile} {pointer[1:]} group {layout.group_size}"
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    return Case(name, kernel, signature, constexprs, config.num_warps, config.num_stages)
