"""torchao 0.18.0: on a GPU and on a CPU, its rounding and packing with kernels of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.kernels.bench.peers.base import (
    Built,
    check_device,
    check_dtype,
    check_group,
    require,
    weight_from_unit_vectors,
)
from harness.kernels.bench.peers.int4pack import GROUPS


def build(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """torchao's int4 weight-only linear in the only packing of a device whose kernel is part of torch.

    On a GPU that kernel is tinygemm's again, with torchao's rounding and padding; the other packings, including the
    default, use kernels of another library, mslk. On a CPU it is torch's int4 kernel, and a prototype of torchao.
    """
    require("torchao", "torchao")
    check_device("torchao", weight, ("cuda", "cpu"))
    check_dtype("torchao", dtype, (torch.bfloat16,))
    check_group("torchao", weight, group_size, GROUPS)
    from torchao.quantization import quantize_

    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    device = weight.device  # a closure over `weight` would keep the floats in memory
    model = nn.Sequential(linear)
    quantize_(model, _config(device, group_size))
    stored: Any = linear.weight
    nbytes = stored.qdata.nbytes + stored.scale_and_zero.nbytes
    return model[0], lambda: weight_from_unit_vectors(model[0], columns, dtype, device), nbytes


def _config(device: torch.device, group_size: int) -> Any:
    """By default, torchao would also set torch.compile's options for the whole process."""
    if device.type == "cpu":
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=group_size, set_inductor_config=False)
    from torchao.quantization import Int4WeightOnlyConfig

    packing = "tile_packed_to_4d"
    return Int4WeightOnlyConfig(group_size=group_size, int4_packing_format=packing, set_inductor_config=False)
