"""Checkpoints of torchao in safetensors, as transformers writes them: parts of its classes, described in the header.

    <linear>._weight_<part>   since torchao 0.15; in 0.14 <linear>.weight:<part>, and <parameter>:_data for floats
    header                    for each weight, in JSON, its class, `_type`, and attributes, `_data`

    Int8Tensor                qdata (N, K) int8; scale and zero_point (N, G), (N, 1) or (1, 1)
    IntxUnpackedToInt8Tensor  likewise; codes have the bits of `target_dtype`
    Int4Tensor                qdata (N, K / 2), codes with a sign, the first input in the low half of a byte; scale and
                              zero_point (G, N): weight = code * scale + zero_point
    small floats              see torchao_floats.py
    act_quant_kwargs          how inputs are quantized; with act_quant_scale and act_quant_zero_point, calibrated

Source: torchao, prototype/safetensors and quantization/quantize_/workflows; FBGEMM, quantize.py, pack_int4.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from harness.core import QTensor
from harness.core.formats.packing import unpack
from harness.models.checkpoint import CheckpointError, weight_files
from harness.models.exchange.integers import SCALES, integers, offsets, unsigned
from harness.models.exchange.reader import (
    Reader,
    Shapes,
    StoredLinear,
    Tensors,
    bits_of,
    damaged,
    expect,
    unsupported,
)
from harness.models.exchange.torchao_floats import float8, mx, nvfp4
from harness.models.exchange.torchao_inputs import ACTIVATIONS, inputs_of, named
from harness.models.tensors import TensorFiles

Json = Mapping[str, Any]


class TorchAO(Reader):
    """Linears with `qdata`."""

    name = "torchao"
    key = "qdata"
    parts = ("qdata", "scale", "zero_point", "scale_and_zero", "per_tensor_scale", *ACTIVATIONS)
    joint = "._weight_"

    def __init__(self, section: Json, files: TensorFiles, shapes: Callable[[], Shapes] = dict) -> None:
        super().__init__(section, files, shapes)
        pickles = [file.name for file in weight_files(files.folder) if file.suffix != ".safetensors"]
        if pickles:
            remedy = "load it with torchao, and save it as safetensors"
            raise CheckpointError("has a format without a reader", f"{pickles[0]} is a pickle of torchao", remedy)
        if any(name.endswith(".weight:qdata") for name in files.stored):
            self.joint = ".weight:"

    def parameter(self, tensor: str) -> str:
        return tensor.removesuffix(":_data")

    def read(self, name: str) -> StoredLinear:
        kind, attributes = self._described(name)
        read = _CLASSES.get(kind)
        if read is None:
            raise unsupported("_type", kind, ", ".join(_CLASSES))
        tensors = self.tensors(name, ("scale",))
        weight = read(name, tensors, attributes)
        return StoredLinear(weight, bits_of(tensors, *ACTIVATIONS), inputs_of(name, attributes, tensors))

    def _described(self, name: str) -> tuple[str, Json]:
        """The class of a weight, and its attributes, by the header of its file."""
        try:
            described = json.loads(self.files.metadata.get(f"{name}.weight", ""))
            attributes = described["_data"]
        except (ValueError, TypeError, KeyError) as error:
            raise damaged(f"the header of its file does not describe {name}.weight") from error
        if not isinstance(attributes, Mapping):
            raise damaged(f"the header of its file has no attributes of {name}.weight")
        return str(described.get("_type")), attributes


def _int8(name: str, tensors: Tensors, attributes: Json) -> QTensor:
    return _integers(name, tensors, 8)


def _intx(name: str, tensors: Tensors, attributes: Json) -> QTensor:
    dtype = named(attributes.get("target_dtype"))
    widths: dict[object, int] = {f"int{bits}": bits for bits in range(2, 9)}
    if dtype not in widths:
        raise unsupported("target_dtype", dtype, "int2 to int8")
    return _integers(name, tensors, widths[dtype])


def _integers(name: str, tensors: Tensors, bits: int) -> QTensor:
    signed = expect(name, "weight.qdata", tensors["qdata"], torch.int8, -1, -1)
    scale = expect(name, "weight.scale", tensors["scale"], SCALES, -1, -1)
    zero_point = tensors.get("zero_point")
    if zero_point is not None:
        zero_point = expect(name, "weight.zero_point", zero_point, torch.int8, *scale.shape).int() + (1 << bits - 1)
    return integers(name, unsigned(name, signed, bits), scale, zero_point, bits)


def _int4(name: str, tensors: Tensors, attributes: Json) -> QTensor:
    packed = expect(name, "weight.qdata", tensors["qdata"], (torch.int8, torch.uint8), -1, -1).view(torch.uint8)
    rows = len(packed)
    codes = unpack(packed.flatten(), 4, (rows, 2 * packed.shape[1])) ^ 8  # from codes with a sign to codes from 0
    scale = expect(name, "weight.scale", tensors["scale"], SCALES, -1, rows).t().float()
    if "zero_point" not in tensors:
        raise damaged(f"{name}.weight.zero_point is absent")
    middle = expect(name, "weight.zero_point", tensors["zero_point"], SCALES, *scale.t().shape).t().float()
    return offsets(name, codes, scale.contiguous(), middle - 8 * scale, 4)


_CLASSES: dict[str, Callable[[str, Tensors, Json], QTensor]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
    "Float8Tensor": float8,
    "MXTensor": mx,
    "NVFP4Tensor": nvfp4,
}
