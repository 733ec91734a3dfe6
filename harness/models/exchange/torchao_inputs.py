"""What quantizes the inputs of torchao's linears, by the attributes of their weights.

Source: torchao, quantization/quantize_/workflows, int8_tensor.py, intx_unpacked_to_int8_tensor.py, float8_tensor.py;
prototype/mx_formats, mx_tensor.py, nvfp4_tensor.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from harness.core import FloatActivation, IntActivation
from harness.core.formats import InputQuantizer
from harness.models.exchange.inputs import calibrated, dynamic_fp8, nvfp4
from harness.models.exchange.integers import SCALES
from harness.models.exchange.reader import Tensors, damaged, expect, unsupported

ACTIVATIONS = ("act_quant_scale", "act_quant_zero_point", "act_pre_scale", "act_per_tensor_scale")
_PER_TOKEN = "int8_asym_per_token"
Json = Mapping[str, Any]


def named(value: object) -> object:
    """What an enumeration or a dtype of the header is called."""
    return value.get("_data") if isinstance(value, Mapping) else value


def inputs_of(name: str, attributes: Json, tensors: Tensors) -> InputQuantizer | None:
    """What quantizes the inputs of the linear `name`; None if nothing does.

    Raises: CheckpointError for a way that is none of this project's.
    """
    if "act_pre_scale" in tensors:
        raise unsupported("act_pre_scale", f"of {name}", "none")
    settings, whole = attributes.get("act_quant_kwargs"), attributes.get("activation_quantization")
    if whole is not None:
        if whole != _PER_TOKEN:
            raise unsupported("activation_quantization", whole, _PER_TOKEN)
        return InputQuantizer(IntActivation(bits=8, symmetric=False, granularity="token"))
    if named(attributes.get("activation_dtype")) == "float8_e4m3fn":
        return dynamic_fp8(None)
    if settings is None:
        return None
    if not isinstance(settings, Mapping) or not isinstance(settings.get("_data"), Mapping):
        raise damaged(f"the header of its file has act_quant_kwargs of {name} without _data")
    kind = str(settings.get("_type"))
    read = _KINDS.get(kind)
    if read is None:
        raise unsupported("act_quant_kwargs", kind, ", ".join(_KINDS))
    return read(name, settings["_data"], tensors)


def _int8(name: str, settings: Json, tensors: Tensors) -> InputQuantizer:
    bits = 7 if settings.get("reduce_range") else 8
    symmetric = named(settings.get("mapping_type")) == "SYMMETRIC"
    if "act_quant_scale" not in tensors:
        granularity = _granularity(settings)
        return InputQuantizer(IntActivation(bits=bits, symmetric=symmetric, granularity=granularity))
    fmt = IntActivation(bits=bits, symmetric=symmetric, granularity="tensor", dynamic=False)
    scale = tensors["act_quant_scale"].reshape(-1)
    zero_point = None
    if not symmetric:
        if "act_quant_zero_point" not in tensors:
            raise damaged(f"{name}.weight.act_quant_zero_point is absent")
        stored = expect(name, "weight.act_quant_zero_point", tensors["act_quant_zero_point"].reshape(-1), torch.int8, 1)
        zero_point = stored.int() + fmt.mid_code
    return calibrated(fmt, expect(name, "weight.act_quant_scale", scale, SCALES, 1), zero_point)


def _float8(name: str, settings: Json, tensors: Tensors) -> InputQuantizer:
    if (dtype := named(settings.get("float8_dtype"))) != "float8_e4m3fn":
        raise unsupported("float8_dtype", dtype, "float8_e4m3fn")
    for bound in ("hp_value_lb", "hp_value_ub"):
        if settings.get(bound) is not None:
            raise unsupported(bound, settings[bound], "null")
    return InputQuantizer(FloatActivation(element="e4m3", granularity=_granularity(settings)))


def _mx(name: str, settings: Json, tensors: Tensors) -> InputQuantizer:
    elements = {"float4_e2m1fn_x2": "e2m1", "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
    rules: dict[object, Literal["floor", "ceil"]] = {"FLOOR": "floor", "RCEIL": "ceil"}
    dtype, mode = named(settings.get("elem_dtype")), named(settings.get("scaling_mode"))
    if dtype not in elements or mode not in rules:
        raise unsupported("elem_dtype and scaling_mode", f"{dtype} and {mode}", "FP8 or FP4, and FLOOR or RCEIL")
    fmt = FloatActivation(
        element=elements[str(dtype)],
        granularity="group",
        group_size=int(settings.get("block_size", 32)),
        scale_dtype="e8m0",
        scale_rule=rules[mode],
    )
    return InputQuantizer(fmt)


def _nvfp4(name: str, settings: Json, tensors: Tensors) -> InputQuantizer:
    if settings.get("use_dynamic_per_tensor_scale"):
        return nvfp4(None)
    return nvfp4(tensors.get("act_per_tensor_scale", torch.ones(())))


def _granularity(settings: Json) -> Literal["token", "tensor"]:
    stored = settings.get("granularity")
    kind = stored.get("_type") if isinstance(stored, Mapping) else stored
    if kind == "PerRow":
        return "token"
    if kind == "PerTensor":
        return "tensor"
    raise unsupported("granularity", kind, "PerRow or PerTensor")


_KINDS: dict[str, Callable[[str, Json, Tensors], InputQuantizer]] = {
    "QuantizeTensorToInt8Kwargs": _int8,
    "QuantizeTensorToFloat8Kwargs": _float8,
    "QuantizeTensorToMXKwargs": _mx,
    "QuantizeTensorToNVFP4Kwargs": _nvfp4,
}
