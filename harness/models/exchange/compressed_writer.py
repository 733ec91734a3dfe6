"""Writes checkpoints of compressed-tensors, see `compressed`: integers and small floats, with 8-bit inputs."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import torch

from harness.core import (
    FloatActivation,
    FloatQTensor,
    FloatWeight,
    IntActivation,
    IntQTensor,
    IntWeight,
    QTensor,
    Scheme,
)
from harness.core.formats import InputQuantizer
from harness.core.formats.format import ActivationFormat
from harness.core.formats.qtensor import GroupedQTensor
from harness.models.exchange.folder_writer import FolderWriter, Linears
from harness.models.exchange.reader import Tensors
from harness.models.exchange.words import to_stream
from harness.models.exchange.writer import zero_points

Json = dict[str, Any]

_PACKED, _INT, _FP8 = "pack-quantized", "int-quantized", "float-quantized"
_NVFP4, _MXFP4, _MIXED = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision"
_CALIBRATED = ("grid", "clip")  # decide a scale that is stored


class CompressedWriter(FolderWriter):
    """A group of settings for all linears; with a width for each linear, a group for each width."""

    name = "compressed-tensors"

    def check(self, scheme: Scheme) -> None:
        self._settings(scheme)

    def section(self, scheme: Scheme, linears: Linears, floats: list[str]) -> Json:
        names: dict[str, list[str]] = {}
        for name, (weight, _) in linears.items():
            assert isinstance(weight, GroupedQTensor)  # `parts` refuses others
            fmt: Any = weight.fmt
            names.setdefault(json.dumps(self._settings(replace(scheme, weight=fmt))), []).append(name)
        groups = [
            {"targets": listed if len(names) > 1 else ["Linear"], **json.loads(settings)}
            for settings, listed in names.items()
        ]
        forms = {group["format"] for group in groups}
        return {
            "quant_method": "compressed-tensors",
            "format": forms.pop() if len(forms) == 1 else _MIXED,
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
            "ignore": floats,
            "kv_cache_scheme": None,
        }

    def parts(self, weight: QTensor, inputs: InputQuantizer | None) -> Tensors:
        calibrated = _calibrated(inputs) if inputs is not None and not inputs.fmt.dynamic else {}
        if isinstance(weight, IntQTensor):
            return (_packed(weight) if inputs is None else _bytes(weight)) | calibrated
        if isinstance(weight, FloatQTensor):
            return _floats(weight) | calibrated
        # Version 0.20 has no order of groups any more: its decoder would take the columns as they come.
        raise self.refuse("the weight", type(weight).__name__, "integers or small floats in the order of the inputs")

    def _settings(self, scheme: Scheme) -> Json:
        """The group of settings of linears in a scheme, without its targets.

        Raises: ValueError if there are none for it.
        """
        fmt, inputs = scheme.weight, scheme.activation
        if isinstance(fmt, IntWeight) and not isinstance(inputs, FloatActivation):
            form, weights = _PACKED if inputs is None else _INT, _integer_settings(self.integers(scheme))
        elif isinstance(fmt, FloatWeight) and not isinstance(inputs, IntActivation):
            form, weights = self._float_settings(scheme, fmt)
        else:
            raise self.refuse("scheme", scheme.name, "integers or small floats, with inputs of the same kind or floats")
        weights = {"symmetric": True, "dynamic": False, "observer": "minmax"} | weights
        args = None if inputs is None else self._inputs(inputs)
        return {"weights": weights, "input_activations": args, "output_activations": None, "format": form}

    def _float_settings(self, scheme: Scheme, fmt: FloatWeight) -> tuple[str, Json]:
        args: Json = {"type": "float", "num_bits": fmt.bits}
        if fmt.element == "e4m3" and fmt.granularity in ("tensor", "channel") and fmt.scale_dtype != "e8m0":
            return _FP8, args | {"strategy": fmt.granularity}
        if fmt.element == "e4m3" and fmt.granularity == "block":
            return _FP8, args | {"strategy": "block", "block_structure": [fmt.group_size, fmt.group_size]}
        group = {"group_size": fmt.group_size}
        if (fmt.element, fmt.scale_dtype, fmt.group_size, fmt.tensor_scale) == ("e2m1", "e4m3", 16, True):
            return _NVFP4, args | group | {"strategy": "tensor_group"}
        if (fmt.element, fmt.scale_dtype, fmt.group_size) == ("e2m1", "e8m0", 32):
            return _MXFP4, args | group | {"strategy": "group"}
        raise self.refuse("scheme", scheme.name, "FP8 per tensor, channel or block, NVFP4 or MXFP4")

    def _inputs(self, fmt: ActivationFormat) -> Json:
        """The settings of inputs, whose format must be that which the library computes for them.

        Raises: ValueError if it is another one.
        """
        where = "scheme.activation"
        theirs = _of_the_library(fmt)
        for name in (field.name for field in fields(theirs)):
            own, expected = getattr(fmt, name), getattr(theirs, name)
            if own != expected and (fmt.dynamic or name not in _CALIBRATED):
                raise self.refuse(f"{where}.{name}", own, str(expected))
        if fmt.dynamic and fmt.granularity == "tensor":
            raise self.refuse(f"{where}.granularity", "tensor", "token, or a calibrated range (dynamic=false)")
        if isinstance(fmt, IntActivation) and fmt.granularity == "group":
            raise self.refuse(f"{where}.granularity", "group", "token")
        args: Json = {"type": "int" if isinstance(fmt, IntActivation) else "float", "num_bits": fmt.bits}
        args |= {"symmetric": fmt.symmetric, "dynamic": fmt.dynamic, "strategy": fmt.granularity}
        return args | ({"group_size": fmt.group_size} if fmt.granularity == "group" else {})


def _of_the_library(fmt: ActivationFormat) -> ActivationFormat:
    """The format that the library computes: scales of the whole range, on the full grid if it is symmetric."""
    shape: Json = {"granularity": fmt.granularity, "group_size": fmt.group_size, "dynamic": fmt.dynamic}
    if isinstance(fmt, IntActivation):
        return IntActivation(bits=8, symmetric=fmt.symmetric, **shape)
    return FloatActivation(element="e4m3", **shape)


def _integer_settings(fmt: IntWeight) -> Json:
    grouped = fmt.granularity == "group" and fmt.group_size > 0
    strategy: Json = {"strategy": "group", "group_size": fmt.group_size} if grouped else {"strategy": "channel"}
    return {"num_bits": fmt.bits, "type": "int", "symmetric": fmt.symmetric} | strategy


def _calibrated(inputs: InputQuantizer) -> Tensors:
    """The scale of calibrated inputs, and their zero point as a code with a sign."""
    scale = {"input_scale": inputs.scale.float().reshape(1)}
    if inputs.zero_point is None:
        return scale
    return scale | {"input_zero_point": (inputs.zero_point.reshape(1) - (1 << inputs.fmt.bits - 1)).to(torch.int8)}


def _packed(weight: IntQTensor) -> Tensors:
    """Codes in words, of linears with float inputs."""
    bits = weight.fmt.bits
    parts = {
        "weight_packed": to_stream(weight.codes, bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.fmt.symmetric:
        return parts
    points = zero_points(weight).t().contiguous().to(torch.uint8)
    return parts | {"weight_zero_point": to_stream(points, bits).t().contiguous()}


def _bytes(weight: IntQTensor) -> Tensors:
    """Codes with a sign in bytes, of linears with integer inputs."""
    middle = 1 << weight.fmt.bits - 1
    parts = {"weight": (weight.codes.to(torch.int16) - middle).to(torch.int8), "weight_scale": weight.scale}
    if weight.fmt.symmetric:
        return parts
    return parts | {"weight_zero_point": (zero_points(weight) - middle).to(torch.int8)}


def _floats(weight: FloatQTensor) -> Tensors:
    scale = weight.scale
    if weight.fmt.bits == 8:
        return {
            "weight": weight.qweight,
            "weight_scale": scale.reshape(1) if weight.fmt.granularity == "tensor" else scale,
        }
    packed = weight.qweight.view(weight.shape[0], -1)
    if weight.tensor_scale is None:
        return {"weight_packed": packed, "weight_scale": scale.view(torch.uint8)}
    whole = (1 / weight.tensor_scale).reshape(1)
    return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": whole}
