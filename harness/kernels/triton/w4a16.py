"""Weight-only int4 and int8 matmul with 16-bit activations: launchers, torch operator and kernel module.

`tune` or the caller chooses one of three paths. `split` is for few rows: several programs share K and write their sums
to an fp32 scratch tensor, which a second kernel adds in a fixed order. `tensor` is for more rows. `dequantize` decodes
the weight once and calls the library's matmul; it is for the numbers of rows for which this is faster. No path
synchronises, and the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from harness.core import IntQTensor
from harness.kernels.base import Kernel
from harness.kernels.triton import tiles, tune
from harness.kernels.triton.case import Case
from harness.kernels.triton.matmul import dequantize_kernel, matmul_kernel, reduce_kernel
from harness.kernels.triton.tiles import Layout, Packed
from harness.kernels.triton.tune import Config

_DTYPES = (torch.float16, torch.bfloat16)
_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}
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
        weight.codes.view(torch.uint16),
        weight.scale,
        weight.scale if weight.zero_point is None else weight.zero_point,
        x if bias is None else bias,
        out,
        M,
        layout.N,
        layout.K,
        layout.groups,
        **_format(layout, weight.zero_kind),
        **_tiling(config, weight.zero_kind, x.dtype),
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
    zero = weight.scale if weight.zero_point is None else weight.zero_point
    words, constants = weight.codes.view(torch.uint16), _format(layout, weight.zero_kind)
    dequantize_kernel[grid](words, weight.scale, zero, out, layout.N, layout.K, layout.groups, **constants)
    return out


def _format(layout: Layout, zero_kind: str) -> dict[str, object]:
    """The compile-time constants of the kernels that describe how a weight is stored."""
    group = layout.group_size if layout.groups > 1 else 0
    compiled = not triton.knobs.runtime.interpret
    return {"BITS": layout.bits, "HALF": layout.half, "GROUP": group, "ZERO": zero_kind, "ASM": compiled}


def _tiling(config: Config, zero_kind: str, dtype: torch.dtype) -> dict[str, object]:
    """The compile-time constants of the matmul that describe its launch.

    With few rows, groups are scaled after the dot, except with float zero points: 16 bits cannot represent a code
    minus a float zero point exactly.
    """
    work = tl.float16 if dtype == torch.float16 else tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16
    blocks = {"BLOCK_N": config.block_n, "BLOCK_M": config.block_m, "SPLIT_K": config.split_k}
    return {**blocks, "HOIST": config.path == "split" and zero_kind != "float", "WORK": work}


@torch.library.custom_op("ptqbench::weight_only_linear", mutates_args=())
def weight_only_linear(  # noqa: PLR0913 - torch operators take only tensors and numbers
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    N: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """Compute y (M, N) = x W^T + b for x (M, K), with the configuration that `tune` chooses."""
    M, K = x.shape
    layout = Layout(N, K, bits, group_size)
    if M == 0:
        return x.new_empty(0, N)
    config = tune.choose(_name(bits), M, N, K, group_size, x.dtype, x.device)
    return matmul(x.contiguous(), Packed(packed, scale, zero_point, layout), bias, config)


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
    """Whether `TritonInt` can run this weight with activations of `dtype`."""
    group_size = _group_size(weight)
    fits = group_size == weight.shape[1] or group_size % 16 == 0
    known = type(weight) is IntQTensor and weight.fmt.bits in (4, 8) and dtype in _DTYPES and fits
    return known and (dtype != torch.float16 or _in_float16(weight.scale))


def _in_float16(scale: Tensor) -> bool:
    """Whether float16 can hold the scales, as the kernel does for inputs in float16: always if they are stored so."""
    if scale.dtype == torch.float16:
        return True
    low, high = scale.aminmax()
    limits = torch.finfo(torch.float16)
    return bool(low >= limits.tiny and high <= limits.max)


def _group_size(weight: IntQTensor) -> int:
    return weight.shape[1] // weight.scale.shape[1]


class TritonInt(Kernel):
    """A weight of int4 or int8 codes, for Triton's matmul with fp16 or bf16 inputs."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, weight: IntQTensor, dtype: torch.dtype) -> None:
        """Pack `weight` for activations of `dtype`.

        Raises: ValueError if `supports` returns False.
        """
        super().__init__(weight.shape)
        if not supports(weight, dtype):
            raise ValueError(
                f"bits={weight.fmt.bits} in groups of {_group_size(weight)} with {dtype} activations has no Triton "
                "kernel; expected 4 or 8 bits, groups of a multiple of 16 inputs or whole rows, and float16 or bfloat16"
            )
        self.layout = Layout(*weight.shape, bits=weight.fmt.bits, group_size=_group_size(weight))
        self.name = _name(weight.fmt.bits)
        self.dtype = dtype
        self.register_buffer("packed", tiles.pack_codes(weight.codes, self.layout))
        self.register_buffer("scale", tiles.pack_params(weight.scale, self.layout))
        self.register_buffer("zero_point", self._pack_zero_point(weight))

    def _pack_zero_point(self, weight: IntQTensor) -> Tensor | None:
        fmt = weight.fmt
        if weight.zero_point is None:
            return None
        if fmt.zero_point == "float":
            return tiles.pack_params(weight.zero_point, self.layout)
        return tiles.pack_zero_points(weight.zero_points().to(torch.uint8), self.layout)

    def weight(self) -> Packed:
        """The buffers in the form that the kernels read."""
        return Packed(self.packed, self.scale, self.zero_point, self.layout)

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        (N, K), layout = self.shape, self.layout
        rows, buffers = inputs.reshape(-1, K), (self.packed, self.scale, self.zero_point)
        y: Tensor = weight_only_linear(rows, *buffers, bias, N, layout.bits, layout.group_size)
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


def autotune(kernel: TritonInt, M: int) -> Config:
    """Time the candidates for M input rows and store the fastest one for all weights of this shape and format."""
    weight, (N, K) = kernel.weight(), kernel.shape
    x = torch.randn(M, K, device=weight.codes.device, dtype=kernel.dtype)
    problem = tune.Problem(kernel.name, M, N, K, weight.layout.group_size, kernel.dtype)

    def run(config: Config) -> None:
        matmul(x, weight, None, config)

    return tune.autotune(problem, candidates(M), run, x.device)


def cases() -> list[Case]:
    """Variants to inspect: few and many rows, both dtypes, several group sizes, and the dequantize kernel."""
    few = Config(64, 16, 2, num_warps=4, num_stages=5, path="split")
    middle = Config(64, 64, 1, num_warps=4, num_stages=4, path="tensor")
    many = Config(128, 128, 1, num_warps=8, num_stages=3, path="tensor")
    matmul_cases = [
        _matmul_case(dtype, 4, group_size, config)
        for dtype in _DTYPES
        for group_size in (128, 64, 32)
        for config in (few, middle, many)
    ]
    matmul_cases += [_matmul_case(torch.bfloat16, 8, 4096, config) for config in (few, many)]
    return matmul_cases + [_dequantize_case(dtype) for dtype in _DTYPES]


def _matmul_case(dtype: torch.dtype, bits: int, group_size: int, config: Config) -> Case:
    layout = Layout(4096, 4096, bits, group_size)
    work = tl.float16 if dtype == torch.float16 else tl.bfloat16
    compiled = {"EVEN_K": True, "BIAS": False, "ASM": True, "WORK": work}
    constexprs = {**_format(layout, "integer"), **_tiling(config, "integer", dtype), **compiled}
    pointer = _POINTERS[dtype]
    types = {"x": pointer, "packed": "*u16", "scale": "*fp16", "zero": "*u8", "bias": pointer}
    types |= {"out": "*fp32" if config.split_k > 1 else pointer, "M": "i32", "N": "i32", "K": "i32", "groups": "i32"}
    name = f"{_name(bits)} {config.path} {config.block_n}x{config.block_m} {pointer[1:]} group {group_size}"
    signature = {argument: types.get(argument, "constexpr") for argument in matmul_kernel.arg_names}
    return Case(name, matmul_kernel, signature, constexprs, config.num_warps, config.num_stages)


def _dequantize_case(dtype: torch.dtype) -> Case:
    constexprs = {**_format(Layout(4096, 4096, 4, 128), "integer"), "ASM": True}
    types = {"packed": "*u16", "scale": "*fp16", "zero": "*u8", "out": _POINTERS[dtype]}
    types |= {"N": "i32", "K": "i32", "groups": "i32"}
    signature = {argument: types.get(argument, "constexpr") for argument in dequantize_kernel.arg_names}
    return Case(f"dequantize {_POINTERS[dtype][1:]}", dequantize_kernel, signature, constexprs, 4, 2)
