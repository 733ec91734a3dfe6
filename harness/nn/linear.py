"""QuantLinear: a linear that runs from its stored bits, with its input quantized where the scheme says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.core import QTensor
from harness.core.formats import InputQuantizer
from harness.kernels.base import Kernel
from harness.kernels.table import choose


class QuantLinear(nn.Module):
    """y = x' W'^T + b with W' (N out, K in) of a QTensor and x' the inputs, quantized where the scheme says so.

    It starts with the QTensor and its decoded weight in memory. `pack` keeps what a kernel reads, and nothing else
    (execution=packed); `simulate` keeps the decoded weight (execution=simulated). Both give the same result.
    """

    bias: Tensor | None
    decoded: Tensor | None

    def __init__(
        self, weight: QTensor, bias: Tensor | None, dtype: torch.dtype, input_quantizer: InputQuantizer | None = None
    ) -> None:
        super().__init__()
        self.shape = weight.shape
        self.dtype = dtype
        self.stored_bits = weight.stored_bits
        self.input_quantizer = input_quantizer
        self.register_buffer("bias", bias)
        self.packed: QTensor | Kernel | None = weight
        self.register_buffer("decoded", None if weight.quantizes_inputs else weight.dequantize(dtype))

    @property
    def kernel(self) -> str:
        """Name of what runs once packed."""
        assert self.packed is not None
        return self.packed.name if isinstance(self.packed, Kernel) else self.packed.kernel

    def refresh(self) -> None:
        """Take note that the QTensor's floats have changed; before `pack` and `simulate`."""
        assert isinstance(self.packed, QTensor)
        self.stored_bits = self.packed.stored_bits
        if self.decoded is not None:
            self.decoded = self.packed.dequantize(self.dtype)

    def pack(self) -> QuantLinear:
        """Keep the weight in the order of the kernel that runs it, or the QTensor where none does."""
        self.decoded = None
        assert isinstance(self.packed, QTensor)
        device = next(self.packed.buffers()).device
        self.packed = choose(self.packed, self.input_quantizer, self.dtype, device) or self.packed
        return self

    def simulate(self) -> QuantLinear:
        """Keep the decoded weight alone; a QTensor that quantizes its inputs itself has none and stays."""
        if self.decoded is not None:
            self.packed = None
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        itself = self.decoded is None and self.packed is not None and self.packed.quantizes_inputs
        if self.input_quantizer is not None and not itself:
            inputs = self.input_quantizer(inputs)
        if self.decoded is not None:
            return F.linear(inputs, self.decoded, self.bias)
        if isinstance(self.packed, QTensor):
            return self.packed.linear(inputs, self.bias)
        assert self.packed is not None
        found: Tensor = self.packed(inputs, self.bias)
        return found


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """`modules` in the places of those of their names, which are put back at the end, whatever happens inside."""
    kept = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            replace(model, name, module)
        yield
    finally:
        for name, module in kept.items():
            replace(model, name, module)


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


def resident_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as they are in memory, in the order of the kernels that run them."""
    strided, other = dict[int, int](), 0
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.layout == torch.strided:
            strided[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        else:  # a kernel's own, which shares nothing
            other += tensor.nbytes
    return sum(strided.values()) + other
