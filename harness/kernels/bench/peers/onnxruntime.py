"""onnxruntime 1.32.0 (and onnx 1.23.2, which writes the model): a model of one MatMulNBits, for CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core import IntQTensor
from harness.kernels.bench.peers.base import (
    Built,
    check_device,
    check_dtype,
    check_group,
    paired,
    require,
    rounded,
)

_FLOAT, _INT8 = 1, 4  # accuracy_level: sums in float32, or of inputs rounded to int8
_OPSET, _IR_VERSION = 21, 10


def build(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """Products in float32."""
    return _built(weight, group_size, dtype, _FLOAT)


def build_int8(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """Products of inputs rounded to int8."""
    return _built(weight, group_size, dtype, _INT8)


def _built(weight: Tensor, group_size: int, dtype: torch.dtype, accuracy_level: int) -> Built:
    require("onnxruntime", "onnxruntime")
    require("onnx", "onnx")
    check_device("onnxruntime", weight, ("cpu",))
    check_dtype("onnxruntime", dtype, (torch.float32,))
    check_group("onnxruntime", weight, group_size, (16, 32, 64, 128, 256))
    quantized = rounded(weight, group_size, dtype)
    stored = _stored(quantized)
    session = _session(_model(quantized, stored, group_size, accuracy_level))

    def call(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": inputs.numpy()})[0])

    return call, lambda: quantized.dequantize(torch.float64), sum(part.nbytes for part in stored.values())


def _stored(weight: IntQTensor) -> dict[str, Tensor]:
    """Codes (N, G, group_size / 2) and zero points in pairs, scales (N * G); zero points are padded to pairs."""
    rows, groups = weight.scale.shape
    return {
        "codes": paired(weight.codes).view(rows, groups, -1),
        "scales": weight.scale.flatten(),
        "zero_points": paired(F.pad(weight.zero_points(), (0, groups % 2))),
    }


def _model(weight: IntQTensor, stored: dict[str, Tensor], group_size: int, accuracy_level: int) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = weight.shape
    options = {"N": rows, "K": columns, "bits": 4, "block_size": group_size, "accuracy_level": accuracy_level}
    node = helper.make_node("MatMulNBits", ["x", *stored], ["y"], domain="com.microsoft", **options)
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", rows])],
        [numpy_helper.from_array(part.numpy(), name) for name, part in stored.items()],
    )
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
    content: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION).SerializeToString()
    return content


def _session(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Waiting threads would take the processor from the next kernel in the race.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
