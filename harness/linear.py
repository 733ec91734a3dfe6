"""QuantLinear: a linear that runs from its stored bits, with its input quantized where the scheme says so."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.core.activation import InputQuantizer
from harness.core.qtensor import QTensor


class QuantLinear(nn.Module):
    """y = x' W'^T + b with W' (N out, K in) of a QTensor.

    It starts with the decoded weight in memory (execution=simulated). `pack` drops that and runs from the stored
    bits alone (execution=packed), by the QTensor's own kernel. Both give the same result.
    """

    bias: Tensor | None
    decoded: Tensor | None

    def __init__(
        self, weight: QTensor, bias: Tensor | None, dtype: torch.dtype, input_quantizer: InputQuantizer | None = None
    ) -> None:
        super().__init__()
        self.shape = weight.shape
        self.stored_bits = weight.stored_bits
        self.kernel = weight.kernel
        self.input_quantizer = input_quantizer
        self.register_buffer("bias", bias)
        self.packed: QTensor | None = weight
        self.register_buffer("decoded", None if weight.quantizes_inputs else weight.dequantize(dtype))

    def pack(self) -> QuantLinear:
        """Keep the stored bits alone."""
        self.decoded = None
        return self

    def simulate(self) -> QuantLinear:
        """Keep the decoded weight alone; a QTensor that quantizes its inputs itself has none and stays."""
        if self.decoded is not None:
            self.packed = None
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            inputs = self.input_quantizer(inputs)
        if self.decoded is not None:
            return F.linear(inputs, self.decoded, self.bias)
        assert self.packed is not None
        return self.packed.linear(inputs, self.bias)


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as stored: packed linears by their bits, every other parameter once.

    Buffers that are computed rather than stored (rotary frequencies) are not weights.
    """
    seen: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            bias = module.bias.nbytes if module.bias is not None else 0
            static = sum(buffer.nbytes for buffer in module.input_quantizer.buffers()) if module.input_quantizer else 0
            seen[id(module)] = module.stored_bits // 8 + bias + static
    for parameter in model.parameters():
        seen[id(parameter)] = parameter.nbytes
    return sum(seen.values())
