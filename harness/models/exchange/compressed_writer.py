"""Writes checkpoints of compressed-tensors, see `compressed`: integers, FP8, NVFP4 and MXFP4, and FP8 inputs."""

from __future__ import annotations

from typing import Any

import torch

from harness.core import FloatActivation, FloatQTensor, FloatWeight, IntQTensor, IntWeight, QTensor, Scheme
from harness.core.formats import InputQuantizer, PermutedQTensor
from harness.models.exchange.folder_writer import FolderWriter, Linears
from harness.models.exchange.reader import Tensors
from harness.models.exchange.words import to_stream
from harness.models.exchange.writer import zero_points

Json = dict[str, Any]

_INTEGERS, _FP8, _NVFP4, _MXFP4 = "pack-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"


class CompressedWriter(FolderWriter):
    """One group of settings for all linears."""

    name = "compressed-tensors"

    def check(self, scheme: Scheme) -> None:
        self._weights(scheme)
        self._inputs(scheme)

    def section(self, scheme: Scheme, linears: Linears, floats: list[str]) -> Json:
        form, weights = self._weights(scheme)
        group = {"targets": ["Linear"], "weights": weights, "input_activations": self._inputs(scheme), "format": form}
        return {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group | {"output_activations": None}},
            "ignore": floats,
            "kv_cache_scheme": None,
        }

    def parts(self, weight: QTensor, inputs: InputQuantizer | None) -> Tensors:
        if isinstance(weight, IntQTensor):
            return _integers(weight)
        if isinstance(weight, PermutedQTensor) and isinstance(weight.base, IntQTensor):
            groups = weight.base.scale.shape[1]
            group = torch.arange(weight.shape[1]) // (weight.shape[1] // groups)
            inverse = weight.order.long().argsort()
            codes = to_stream(weight.base.codes[:, inverse], weight.base.fmt.bits)
            return _integers(weight.base) | {"weight_packed": codes, "weight_g_idx": group[inverse].int()}
        if isinstance(weight, FloatQTensor):
            return _floats(weight)
        raise self.refuse("the weight", type(weight).__name__, "integers or small floats")

    def _weights(self, scheme: Scheme) -> tuple[str, Json]:
        """The format and the settings of the weights.

        Raises: ValueError if there are none for them.
        """
        fmt = scheme.weight
        args: Json = {"symmetric": True, "dynamic": False, "observer": "minmax"}
        if isinstance(fmt, IntWeight):
            self.integers(scheme)
            if scheme.activation is not None:
                raise self.refuse("scheme", scheme.name, "integer weights without activations")
            grouped = fmt.granularity == "group" and fmt.group_size > 0
            strategy = {"strategy": "group", "group_size": fmt.group_size} if grouped else {"strategy": "channel"}
            args |= {"num_bits": fmt.bits, "type": "int", "symmetric": fmt.symmetric}
            return _INTEGERS, args | strategy
        if not isinstance(fmt, FloatWeight):
            raise self.refuse("scheme", scheme.name, "integers or small floats")
        args |= {"type": "float", "num_bits": fmt.bits}
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

    def _inputs(self, scheme: Scheme) -> Json | None:
        fmt = scheme.activation
        if fmt is None:
            return None
        dynamic_fp8 = isinstance(fmt, FloatActivation) and fmt.element == "e4m3" and fmt.dynamic
        if not dynamic_fp8 or fmt.granularity == "tensor" or fmt.clip != 1:
            raise self.refuse("scheme.activation", fmt.label, "FP8 scaled at run time, per token or group")
        args: Json = {"type": "float", "num_bits": 8, "symmetric": True, "dynamic": True}
        if fmt.granularity == "group":
            return args | {"strategy": "group", "group_size": fmt.group_size}
        return args | {"strategy": "token"}


def _integers(weight: IntQTensor) -> Tensors:
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


def _floats(weight: FloatQTensor) -> Tensors:
    scale = weight.scale
    if weight.fmt.bits == 8:
        return {
            "weight": weight.qweight,
            "weight_scale": scale.reshape(1) if weight.fmt.granularity == "tensor" else scale,
        }
    codes = weight.codes
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    if weight.tensor_scale is None:
        return {"weight_packed": packed, "weight_scale": scale.view(torch.uint8)}
    whole = (1 / weight.tensor_scale).reshape(1)
    return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": whole}
