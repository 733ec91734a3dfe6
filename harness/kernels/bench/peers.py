"""4-bit weight-only matmuls of other libraries behind one interface, to compare with the kernels of this project.

Each library gets the same float weight and quantizes and packs it in its own way, so the libraries multiply by
different weights: `decoded` returns the weight of each. The calls were written for torch 2.11, gemlite 0.6.0.post2,
torchao 0.18.0, bitsandbytes 0.50.2, humming-kernels 0.1.19 and fbgemm-gpu-genai 1.6.0. Except for torch, none of them
is a dependency.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.core import IntQTensor, WeightFormat, round_to_nearest
from harness.core.scheme import ScaleDtype

Built = tuple[Callable[[Tensor], Tensor], Callable[[], Tensor], int]

_MID_CODE = 8
_INNER_K_TILES = 8  # tinygemm's; all its users choose 8, which gives the widest load
_K_TILE = 16
_N_TILE = 8
_TINYGEMM_GROUPS = (32, 64, 128, 256)
_GEMLITE_COLUMNS = 32
_GEMLITE_GROUP = 16
_FBGEMM_GROUP = 128
_NF4_BLOCK = 64
_CHUNK = 1024  # unit vectors per call of a matmul
_HALVES = (torch.float16, torch.bfloat16)
_SCALE_NAMES: dict[torch.dtype, ScaleDtype] = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Peer:
    """One library's matmul.

    name     its name in the table
    devices  device types on which it is timed
    build    takes a weight (N, K) float32 on the device of the matmul, a group size, and the dtype of x and y; returns
             call(x (M, K)) -> y (M, N); decoded() -> the weight (N, K) float64 that the stored bits represent; and
             the bytes of weight and scales that one call reads.
             Raises: ImportError if the library is missing; ValueError if it does not support the weight or dtype.
    """

    name: str
    devices: tuple[str, ...]
    build: Callable[[Tensor, int, torch.dtype], Built]


def _torch_int4pack(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """tinygemm's aten._weight_int4pack_mm: weight = (code - 8) * scale + zero, in pairs (G, N, 2) bfloat16."""
    _check_device("torch int4pack", weight, ("cuda",))
    _check_dtype("torch int4pack", dtype, (torch.bfloat16,))
    _check_group("torch int4pack", weight, group_size, _TINYGEMM_GROUPS)
    _check_multiple("torch int4pack", weight, _N_TILE, _INNER_K_TILES * _K_TILE)
    halves, pairs = _int4pack_parts(_rounded(weight, group_size, dtype))
    packed = torch.ops.aten._convert_weight_to_int4pack(halves, _INNER_K_TILES)

    def call(inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.aten._weight_int4pack_mm(inputs, packed, group_size, pairs)
        return outputs

    return call, lambda: _int4pack_decoded(halves, pairs), packed.nbytes + pairs.nbytes


def _int4pack_parts(weight: IntQTensor) -> tuple[Tensor, Tensor]:
    """Codes (N, K / 2) uint8 with the even column in the upper half of a byte, and pairs (G, N, 2) bfloat16."""
    codes, scale = weight.codes, weight.scale.float()
    halves = codes[:, ::2] << 4 | codes[:, 1::2]
    pairs = torch.stack([scale, (_MID_CODE - weight.zero_points()) * scale], -1).to(torch.bfloat16)
    return halves, pairs.transpose(0, 1).contiguous()


def _int4pack_decoded(halves: Tensor, pairs: Tensor) -> Tensor:
    """The weight (N, K) float64 that the results of `_int4pack_parts` represent."""
    rows = halves.shape[0]
    codes = torch.stack([halves >> 4, halves & 0xF], -1).view(rows, pairs.shape[0], -1)
    scale, zero = pairs.double().transpose(0, 1).unbind(-1)
    return ((codes.double() - _MID_CODE) * scale[..., None] + zero[..., None]).view(rows, -1)


def _gemlite(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """gemlite's layer for HQQ's format: asymmetric, with float zero points in the dtype of the inputs."""
    _require("gemlite", "gemlite")
    _check_device("gemlite", weight, ("cuda",))  # before the import, which reads the GPU's name
    _check_dtype("gemlite", dtype, _HALVES)
    _check_group("gemlite", weight, group_size)
    _check_multiple("gemlite", weight, 1, _GEMLITE_COLUMNS)
    if group_size < _GEMLITE_GROUP:
        raise ValueError(f"gemlite does not support group_size={group_size}; expected {_GEMLITE_GROUP} or more")
    from gemlite.helper import A16W4_HQQ_INT

    rounded = _rounded(weight, group_size, dtype)
    processor = A16W4_HQQ_INT(device=str(weight.device), dtype=dtype)
    layer = processor.from_weights(rounded.codes, rounded.scale, rounded.zero_points())
    return layer, lambda: _gemlite_decoded(layer), layer.W_q.nbytes + layer.scales.nbytes + layer.zeros.nbytes


def _gemlite_decoded(layer: Any) -> Tensor:
    """The weight (N, K) float64 of a layer's `W_q` (K / 8, N) int32, `scales` and `zeros` (G, N)."""
    words, scale, zero = layer.W_q, layer.scales.double(), layer.zeros.double()
    parts = [words >> 4 * place & 0xF for place in range(layer.elements_per_sample)]
    codes = torch.stack(parts, 1).view(scale.shape[0], -1, scale.shape[1]).double()
    shifted = layer.W_group_mode == 4  # the layer then stores -zero * scale as zeros; not with one group per row
    decoded: Tensor = codes * scale[:, None] + zero[:, None] if shifted else (codes - zero[:, None]) * scale[:, None]
    return decoded.view(-1, scale.shape[1]).t()


def _torchao(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """torchao's int4 weight-only linear in the only packing whose kernel is part of torch.

    That kernel is tinygemm's again, with torchao's rounding and padding. The other packings, including the default,
    use kernels of another library, mslk.
    """
    _require("torchao", "torchao")
    _check_device("torchao", weight, ("cuda",))
    _check_dtype("torchao", dtype, (torch.bfloat16,))
    _check_group("torchao", weight, group_size, _TINYGEMM_GROUPS)
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    device = weight.device  # a closure over `weight` would keep the floats in memory
    # By default, torchao would also set torch.compile's options for the whole process.
    options = {"int4_packing_format": "tile_packed_to_4d", "set_inductor_config": False}
    model = nn.Sequential(linear)
    quantize_(model, Int4WeightOnlyConfig(group_size=group_size, **options))
    stored: Any = linear.weight
    nbytes = stored.qdata.nbytes + stored.scale_and_zero.nbytes
    return model[0], lambda: _weight_from_unit_vectors(model[0], columns, dtype, device), nbytes


def _bitsandbytes(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """bitsandbytes' NF4 in blocks of 64 with float32 scales; it has no groups and ignores `group_size`."""
    _require("bitsandbytes", "bitsandbytes")
    _check_device("bitsandbytes nf4", weight, ("cuda", "cpu"))
    _check_dtype("bitsandbytes nf4", dtype, (*_HALVES, torch.float32))
    if weight.device.type == "cpu":  # 0.50.2 decodes a block that spans rows wrongly on a CPU
        _check_multiple("bitsandbytes nf4", weight, 1, _NF4_BLOCK)
    import bitsandbytes

    matmul: Any = bitsandbytes.matmul_4bit  # type: ignore[attr-defined]  # it does not declare this export
    quantized, float32_state = bitsandbytes.functional.quantize_4bit(
        weight.contiguous(), blocksize=_NF4_BLOCK, compress_statistics=False, quant_type="nf4"
    )
    state = copy.copy(float32_state)
    state.dtype = dtype  # the matmul decodes to it; `float32_state` keeps float32

    def call(inputs: Tensor) -> Tensor:
        outputs: Tensor = matmul(inputs, quantized, state)
        return outputs

    def decoded() -> Tensor:
        values: Tensor = bitsandbytes.functional.dequantize_4bit(quantized, float32_state)
        return values.double()

    return call, decoded, quantized.nbytes + float32_state.absmax.nbytes


def _humming(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """humming's layer with symmetric int4 groups, quantized by humming's kernel."""
    _require("humming", "humming-kernels")
    _check_device("humming", weight, ("cuda",))
    _check_dtype("humming", dtype, _HALVES)
    _check_group("humming", weight, group_size)
    from humming.layer import HummingLayer

    rows, columns = weight.shape
    config = {"dtype": "int4", "group_size": group_size}
    layer = HummingLayer(shape_n=rows, shape_k=columns, weight_config=config, torch_dtype=dtype).to(weight.device)
    schema = layer.weight_schema
    quantized = schema.quant_tensor(weight.contiguous(), schema, dtype)
    layer.load_from_tensors(quantized)
    layer.transform()  # to the kernel's order; there is no inverse

    def decoded() -> Tensor:
        values: Tensor = schema.dequant_tensors(quantized)
        return values.double()

    return layer, decoded, sum(part.nbytes for part in layer.parameters())


def _fbgemm(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """FBGEMM's CUTLASS kernel for preshuffled weights: weight = code * scale + zero, code from -8 to 7."""
    _require("fbgemm_gpu", "fbgemm-gpu-genai")
    _check_device("fbgemm", weight, ("cuda",))
    _check_dtype("fbgemm", dtype, (torch.bfloat16,))
    _check_group("fbgemm", weight, group_size)
    if group_size < _FBGEMM_GROUP:
        raise ValueError(f"fbgemm does not support group_size={group_size}; expected {_FBGEMM_GROUP} or more")
    capability = torch.cuda.get_device_capability(weight.device)
    if capability != (9, 0):
        raise ValueError(f"fbgemm does not support a GPU of compute capability {capability}; expected (9, 0)")
    from fbgemm_gpu.experimental.gen_ai.quantize import int4_row_quantize_zp, pack_int4

    codes, *floats = int4_row_quantize_zp(weight, group_size)  # (N, K) int8, and two tensors (G, N) float32
    scale, zero = (part.to(dtype) for part in floats)
    shuffled, stored_scale = torch.ops.fbgemm.preshuffle_i4(pack_int4(codes), scale)

    def call(inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.fbgemm.bf16i4bf16_shuffled(inputs, shuffled, stored_scale, zero)
        return outputs

    return call, lambda: _fbgemm_decoded(codes, scale, zero), shuffled.nbytes + stored_scale.nbytes + zero.nbytes


def _fbgemm_decoded(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The weight (N, K) float64 of signed codes (N, K), scale and zero (G, N)."""
    groups = codes.view(codes.shape[0], scale.shape[0], -1).double()
    return (groups * scale.double().t()[..., None] + zero.double().t()[..., None]).view(codes.shape)


PEERS: tuple[Peer, ...] = (
    Peer("torch int4pack", ("cuda",), _torch_int4pack),
    Peer("gemlite", ("cuda",), _gemlite),
    Peer("torchao", ("cuda",), _torchao),
    Peer("bitsandbytes nf4", ("cuda", "cpu"), _bitsandbytes),
    Peer("humming", ("cuda",), _humming),
    Peer("fbgemm", ("cuda",), _fbgemm),
)


def _rounded(weight: Tensor, group_size: int, dtype: torch.dtype) -> IntQTensor:
    """A weight (N, K) rounded to an asymmetric 4-bit grid per group, with scales in `dtype`."""
    fmt = WeightFormat(bits=4, granularity="group", group_size=group_size, scale_dtype=_SCALE_NAMES[dtype])
    return round_to_nearest(weight, fmt)


def _weight_from_unit_vectors(
    call: Callable[[Tensor], Tensor], columns: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The weight (N, K) float64 that a matmul returns for unit vectors: each value as the kernel rounds it to `dtype`.

    This is the weight that the kernel multiplies by. If it is packed in the wrong order, only a comparison with the
    original weight shows the error.
    """
    columns_of_weight = []
    for start in range(0, columns, _CHUNK):
        stop = min(start + _CHUNK, columns)
        units = torch.zeros(stop - start, columns, dtype=dtype, device=device)
        units[:, start:stop].fill_diagonal_(1)
        columns_of_weight.append(call(units).double())
    return torch.cat(columns_of_weight).t()


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{package} is not installed (no module {module}); install {package}", name=module)


def _check_device(name: str, weight: Tensor, expected: tuple[str, ...]) -> None:
    if weight.device.type not in expected:
        raise ValueError(f"{name} does not run on {weight.device.type}; expected {' or '.join(expected)}")


def _check_dtype(name: str, dtype: torch.dtype, expected: tuple[torch.dtype, ...]) -> None:
    if dtype not in expected:
        raise ValueError(f"{name} does not support {dtype}; expected {' or '.join(map(str, expected))}")


def _check_group(name: str, weight: Tensor, group_size: int, expected: tuple[int, ...] = ()) -> None:
    if expected and group_size not in expected:
        raise ValueError(f"{name} does not support group_size={group_size}; expected one of {expected}")
    if group_size < 1 or weight.shape[1] % group_size:
        raise ValueError(f"{name} does not support group_size={group_size}; expected a divisor of K={weight.shape[1]}")


def _check_multiple(name: str, weight: Tensor, rows: int, columns: int) -> None:
    if weight.shape[0] % rows or weight.shape[1] % columns:
        raise ValueError(
            f"{name} does not support a weight of (N, K)={tuple(weight.shape)}; expected multiples of {(rows, columns)}"
        )
