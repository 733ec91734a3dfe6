"""Checkpoints of compressed-tensors, as llm-compressor writes them and vLLM loads them.

    pack-quantized            weight_packed (N, ceil(K bits / 32)) int32: codes plus 2^(bits - 1); before version 0.20,
                              codes of 3, 5, 6 and 7 bits did not cross words
    int-, naive-quantized     weight (N, K) int8
    float-, naive-quantized   weight (N, K) float8_e4m3fn
    nvfp4-pack-quantized      weight_packed (N, K / 2) uint8, weight_scale float8_e4m3fn, weight_global_scale float32,
                              which divides
    mxfp4-pack-quantized      weight_packed, weight_scale uint8

    weight_scale       (N, G), (N, 1), (1,), or one for each block
    weight_zero_point  of codes with a sign; int8, or packed along the outputs
    weight_g_idx       the group of each input
    input_scale, input_zero_point, input_global_scale   of calibrated inputs

Source: compressed-tensors, quantization/quant_args.py and compressors/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from harness.core import FloatActivation, IntActivation
from harness.core.formats import InputQuantizer
from harness.core.formats.qtensor import QTensor
from harness.models.exchange.floats import fp4, fp8
from harness.models.exchange.inputs import calibrated, dynamic_fp8, nvfp4, static_fp8
from harness.models.exchange.integers import SCALES, integers, regrouped, unsigned
from harness.models.exchange.reader import Reader, StoredLinear, Tensors, bits_of, damaged, expect, unsupported
from harness.models.exchange.words import WORD, fields, stream

_INPUTS = ("input_scale", "input_zero_point", "input_global_scale")
_MX_GROUP, _NV_GROUP = 32, 16


class CompressedTensors(Reader):
    """Linears with `weight_scale`, in the group of settings that names them."""

    name = "compressed-tensors"
    key = "weight_scale"
    parts = (
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "weight_global_scale",
        *_INPUTS,
    )

    def read(self, name: str) -> StoredLinear:
        if (sparsity := (self.section.get("sparsity_config") or {}).get("format", "dense")) != "dense":
            raise unsupported("sparsity_config.format", sparsity, "dense")
        group = self._group(name)
        args, tensors = _mapping(group, "weights"), self.tensors(name, ("weight_scale",))
        read = {"int": _read_integers, "float": _read_floats}.get(str(args.get("type", "int")))
        if read is None:
            raise unsupported("weights.type", args.get("type"), "int or float")
        weight = read(name, tensors, args)
        return StoredLinear(weight, bits_of(tensors, *_INPUTS), _inputs(name, group, tensors))

    def _group(self, name: str) -> Mapping[str, Any]:
        """The settings of a linear: of the group whose target is its name or a pattern of it, else one of classes."""
        groups = [group for group in _mapping(self.section, "config_groups").values() if isinstance(group, Mapping)]
        named = [group for group in groups if any(_names(target, name) for target in _targets(group))]
        classes = [group for group in groups if "Linear" in _targets(group)]
        chosen = [*named, *classes, *(groups if len(groups) == 1 else [])]
        if not chosen:
            raise damaged(f"no group of config_groups has the target {name}")
        return chosen[0]


def _targets(group: Mapping[str, Any]) -> list[str]:
    return [str(target) for target in group.get("targets") or ()]


def _names(target: str, name: str) -> bool:
    return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name


def _mapping(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = settings.get(key)
    if not isinstance(value, Mapping):
        raise damaged(f"its quantization section has no mapping {key}")
    return value


def _read_integers(name: str, tensors: Tensors, args: Mapping[str, Any]) -> QTensor:
    bits = args.get("num_bits")
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise unsupported("weights.num_bits", bits, "2 to 8")
    scale = expect(name, "weight_scale", _matrix(tensors["weight_scale"]), SCALES, -1, -1)
    codes, zero_point = (_packed if "weight_packed" in tensors else _unpacked)(name, tensors, scale, bits)
    if zero_point is not None and zero_point.shape != scale.shape:
        raise damaged(f"{name}.weight_zero_point has another shape than its scales")
    g_idx = tensors.get("weight_g_idx")
    if g_idx is None or int(g_idx.min()) < 0:
        return integers(name, codes, scale, zero_point, bits)
    expect(name, "weight_g_idx", g_idx, (torch.int32, torch.int64), codes.shape[1])
    return regrouped(name, codes, scale, zero_point, g_idx.long(), bits)


def _packed(name: str, tensors: Tensors, scale: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Codes and zero points in words: they follow one another or, before version 0.20, do not cross words."""
    rows, columns = _shape(name, tensors)
    words = expect(name, "weight_packed", tensors["weight_packed"], torch.int32, rows, -1)
    unpacked = stream if words.shape[1] == -(-columns * bits // WORD) else fields
    zero_point = tensors.get("weight_zero_point")
    if zero_point is not None and zero_point.dtype == torch.int32:
        zero_point = unpacked(zero_point.t(), bits, scale.shape[0]).t()
    elif zero_point is not None:
        zero_point = _matrix(zero_point).int() + (1 << bits - 1)
    return unpacked(words, bits, columns), zero_point


def _unpacked(name: str, tensors: Tensors, scale: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Codes and zero points in int8, with a sign."""
    signed = expect(name, "weight", _required(name, "weight", tensors), torch.int8, -1, -1)
    zero_point = tensors.get("weight_zero_point")
    points = None if zero_point is None else _matrix(zero_point).int() + (1 << bits - 1)
    return unsigned(name, signed, bits), points


def _read_floats(name: str, tensors: Tensors, args: Mapping[str, Any]) -> QTensor:
    bits, scale = args.get("num_bits"), tensors["weight_scale"]
    if bits == 8 and "weight" in tensors:
        return fp8(name, tensors["weight"], scale, _block(args))
    if bits == 4 and "weight_packed" in tensors:
        whole = tensors.get("weight_global_scale")
        return fp4(name, tensors["weight_packed"], scale, None if whole is None else 1 / whole.float())
    raise unsupported("weights.num_bits", bits, "8 with weight, or 4 with weight_packed")


def _block(args: Mapping[str, Any]) -> int | None:
    """Outputs and inputs of a square that shares a scale; None for other strategies."""
    if args.get("strategy") != "block":
        return None
    sides = list(args.get("block_structure") or ())
    if len(sides) != 2 or sides[0] != sides[1]:
        raise unsupported("weights.block_structure", sides, "a square")
    return int(sides[0])


def _shape(name: str, tensors: Tensors) -> tuple[int, int]:
    """N and K of a packed weight."""
    stored = tensors.get("weight_shape")
    if stored is None or stored.numel() != 2:
        raise damaged(f"{name}.weight_shape is absent, or has no two numbers")
    rows, columns = (int(size) for size in stored)
    if rows < 1 or columns < 1 or rows != len(tensors["weight_packed"]):
        raise damaged(f"{name}.weight_shape is {rows}x{columns}, of {len(tensors['weight_packed'])} packed rows")
    return rows, columns


def _matrix(tensor: Tensor) -> Tensor:
    """A scale () or (1,) as (1, 1), and (N,) as (N, 1)."""
    return tensor.reshape(-1, 1) if tensor.dim() < 2 else tensor


def _inputs(name: str, group: Mapping[str, Any], tensors: Tensors) -> InputQuantizer | None:
    """What quantizes the inputs, as the group says."""
    args = group.get("input_activations")
    if not args:
        return None
    dynamic, bits, symmetric = args.get("dynamic", False), args.get("num_bits"), bool(args.get("symmetric", True))
    size = args.get("group_size") or -1
    if args.get("type") == "float":
        return _float_inputs(name, bits, size, dynamic, tensors)
    if bits not in (4, 8):
        raise unsupported("input_activations.num_bits", bits, "4 or 8")
    if dynamic:
        granularity: Literal["group", "token"] = "group" if size > 0 else "token"
        return InputQuantizer(IntActivation(bits=bits, symmetric=symmetric, granularity=granularity, group_size=size))
    fmt = IntActivation(bits=bits, symmetric=symmetric, granularity="tensor", dynamic=False)
    zero_point = None if symmetric else _required(name, "input_zero_point", tensors).int() + (1 << bits - 1)
    return calibrated(fmt, _required(name, "input_scale", tensors), zero_point)


def _float_inputs(name: str, bits: object, size: int, dynamic: object, tensors: Tensors) -> InputQuantizer:
    if bits == 8 and not dynamic:
        return static_fp8(_required(name, "input_scale", tensors))
    if bits == 8:
        return dynamic_fp8(size if size > 0 else None)
    if bits == 4 and size == _NV_GROUP:
        whole = tensors.get("input_global_scale")
        return nvfp4(None if whole is None else 1 / whole.float())
    if bits == 4 and size == _MX_GROUP:
        return InputQuantizer(FloatActivation(element="e2m1", granularity="group", group_size=size, scale_dtype="e8m0"))
    raise unsupported("input_activations", f"{bits} bits in groups of {size}", "8 bits, or 4 in groups of 16 or 32")


def _required(name: str, part: str, tensors: Tensors) -> Tensor:
    """A tensor that the settings of a linear say it has.

    Raises: CheckpointError if it is absent.
    """
    if part not in tensors:
        raise damaged(f"{name}.{part} is absent, though its settings need it")
    return tensors[part]
