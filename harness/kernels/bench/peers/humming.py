"""humming-kernels 0.1.19, for GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.kernels.bench.peers.base import HALVES, Built, check_device, check_dtype, check_group, require


def build(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """humming's layer with symmetric int4 groups, quantized by humming's kernel."""
    require("humming", "humming-kernels")
    check_device("humming", weight, ("cuda",))
    check_dtype("humming", dtype, HALVES)
    check_group("humming", weight, group_size)
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
