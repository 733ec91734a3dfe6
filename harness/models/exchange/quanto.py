"""Checkpoints of optimum-quanto, as its `QuantizedModelForCausalLM` writes them; `quanto_qmap.json` names the types.

    qint8, qfloat8   weight._data (N, K) int8 or 8-bit floats, weight._scale (N, 1), which multiplies
    qint4, qint2     weight._data._data uint8: codes (N K / group_size, group_size), or (N, K), whose bytes hold codes
                     of several rows, the first in low bits; for each row of codes weight._scale and weight._shift:
                     code * scale - shift, or (code - shift) * scale with an integer shift
    input_scale, output_scale   of inputs and outputs in `activations`, calibrated

Source: optimum-quanto, tensor/weights/qbits.py, tensor/packed.py and nn/qmodule.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from harness.core import IntActivation, QTensor
from harness.core.formats import InputQuantizer
from harness.models.exchange.floats import fp8
from harness.models.exchange.inputs import calibrated, static_fp8
from harness.models.exchange.integers import SCALES, integers, offsets, unsigned
from harness.models.exchange.reader import (
    Reader,
    StoredLinear,
    Tensors,
    bits_of,
    damaged,
    expect,
    unsupported,
)
from harness.models.exchange.words import stacked

_ACTIVATIONS = ("input_scale", "output_scale")
_PACKED = ("weight._data._data", "weight._shift")
_BITS = {"qint4": 4, "qint2": 2}
_BYTES = ("qint8", "qfloat8", "qfloat8_e4m3fn", "qfloat8_e5m2")


class Quanto(Reader):
    """Linears with `weight._scale`."""

    name = "quanto"
    key = "weight._scale"
    parts = ("weight._data", "weight._scale", *_PACKED, *_ACTIVATIONS)

    @property
    def notes(self) -> list[str]:
        named = (self._types(name) for name in self.linears)
        outputs = any(types.get("activations", "none") != "none" for types in named)
        return [*super().notes, *(["its quantized outputs are not applied"] if outputs else [])]

    def read(self, name: str) -> StoredLinear:
        kind, inputs = (str(self._types(name).get(key, "none")) for key in ("weights", "activations"))
        needed = {**dict.fromkeys(_BITS, _PACKED), **dict.fromkeys(_BYTES, ("weight._data",))}.get(kind)
        if needed is None:
            raise unsupported("weights", kind, ", ".join((*_BYTES, *_BITS)))
        tensors = self.tensors(name, needed if inputs == "none" else (*needed, "input_scale"))
        weight = self._packed(name, tensors, _BITS[kind]) if kind in _BITS else _bytes(name, tensors)
        return StoredLinear(weight, bits_of(tensors, *_ACTIVATIONS), _inputs(name, inputs, tensors))

    def _types(self, name: str) -> Mapping[str, Any]:
        types = self.section.get(name)
        if not isinstance(types, Mapping):
            raise damaged(f"its quantization section has no types of {name}")
        return types

    def _packed(self, name: str, tensors: Tensors, bits: int) -> QTensor:
        scale = expect(name, "weight._scale", tensors["weight._scale"], SCALES, -1, 1)
        packed = expect(name, _PACKED[0], tensors[_PACKED[0]], torch.uint8, -(-len(scale) * bits // 8), -1)
        shift = expect(name, _PACKED[1], tensors[_PACKED[1]], (scale.dtype, torch.int8, torch.uint8), len(scale), 1)
        rows, columns = self._shape(name)
        size = packed.shape[1]
        if len(scale) * size != rows * columns or columns % size:
            raise damaged(f"{name} has {len(scale)} groups of {size} for a weight {rows}x{columns}")
        codes = stacked(packed, bits, len(scale), from_high=False).view(rows, columns)
        scale, shift = scale.view(rows, -1), shift.view(rows, -1)
        if not shift.is_floating_point():
            return integers(name, codes, scale, shift.int(), bits)
        return offsets(name, codes, scale, -shift, bits)

    def _shape(self, name: str) -> tuple[int, int]:
        """N and K, which the file does not say."""
        if name not in self.shapes:
            raise damaged(f"the model has no linear {name}")
        return self.shapes[name]


def _bytes(name: str, tensors: Tensors) -> QTensor:
    data, scale = tensors["weight._data"], tensors["weight._scale"]
    if data.dtype != torch.int8:
        return fp8(name, data, scale)
    expect(name, "weight._data", data, torch.int8, -1, -1)
    scale = expect(name, "weight._scale", scale, SCALES, len(data), 1)
    return integers(name, unsigned(name, data, 8), scale, None, 8)


def _inputs(name: str, kind: str, tensors: Tensors) -> InputQuantizer | None:
    if kind == "none":
        return None
    scale = expect(name, "input_scale", tensors["input_scale"], SCALES)
    if kind == "qint8":
        return calibrated(IntActivation(bits=8, symmetric=True, granularity="tensor", dynamic=False), scale)
    if kind in ("qfloat8", "qfloat8_e4m3fn"):
        return static_fp8(scale)
    raise unsupported("activations", kind, "none, qint8 or qfloat8_e4m3fn")
