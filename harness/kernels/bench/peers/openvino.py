"""OpenVINO 2026.4.1: a model of one MatMul with a compressed weight, for CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.core import IntQTensor
from harness.kernels.bench.peers.base import Built, check_device, check_dtype, check_group, paired, require, rounded

_FLOAT, _INT8 = 0, 32  # inputs that share a scale when they are rounded to int8, 32 by default; 0: not rounded


def build(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """Products in float32."""
    return _built(weight, group_size, dtype, _FLOAT)


def build_int8(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """Products of inputs rounded to int8, as OpenVINO does by default."""
    return _built(weight, group_size, dtype, _INT8)


def _built(weight: Tensor, group_size: int, dtype: torch.dtype, input_group: int) -> Built:
    require("openvino", "openvino")
    check_device("openvino", weight, ("cpu",))
    check_dtype("openvino", dtype, (torch.float32,))
    check_group("openvino", weight, group_size)
    import openvino

    quantized = rounded(weight, group_size, dtype)
    stored = paired(quantized.codes), paired(quantized.zero_points())
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": input_group,
    }
    request = openvino.compile_model(_model(quantized, *stored), "CPU", options).create_infer_request()

    def call(inputs: Tensor) -> Tensor:
        request.set_input_tensor(openvino.Tensor(inputs.numpy(), shared_memory=True))
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data).clone()  # the next call uses the same memory

    nbytes = sum(part.nbytes for part in stored) + quantized.scale.nbytes
    return call, lambda: quantized.dequantize(torch.float64), nbytes


def _model(weight: IntQTensor, codes: Tensor, zero_points: Tensor) -> Any:
    """y = x W^T with W = (codes - zero points) * scale; `codes` and `zero_points` hold two values in a byte."""
    import openvino
    from openvino import PartialShape, Type, opset13

    def constant(pairs: Tensor, *shape: int) -> Any:
        values = opset13.constant(openvino.Tensor(pairs.numpy(), shape, Type.u4), shared_memory=False)
        return opset13.convert(values, "f32")

    rows, columns = weight.shape
    groups = weight.scale.shape[1]
    scale = opset13.constant(weight.scale.view(rows, groups, 1).numpy())
    centred = opset13.subtract(constant(codes, rows, groups, columns // groups), constant(zero_points, rows, groups, 1))
    decoded = opset13.reshape(opset13.multiply(centred, scale), [rows, columns], special_zero=False)
    inputs = opset13.parameter(PartialShape([-1, columns]), Type.f32)
    return openvino.Model([opset13.matmul(inputs, decoded, False, True)], [inputs], "linear")
