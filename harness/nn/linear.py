"""QuantLinear, a linear that computes with its stored bits, and functions that exchange linears and measure sizes."""

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
from harness.nn.described import Described


class QuantLinear(nn.Module):
    """y = x' W'^T + b, with W' (N out, K in) decoded from a QTensor and x' the inputs, quantized if the scheme says so.

    It starts with the QTensor and its decoded weight in memory. `pack` keeps only the tensors that a kernel reads
    (execution=packed); `simulate` keeps only the decoded weight (execution=simulated). Both give the same result.
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
    def weight(self) -> Described:
        """Shape, dtype and device of the weight, which models ask for to cast inputs; it has no values."""
        return Described(self.shape, self.dtype, next(self.buffers()).device)

    @property
    def kernel(self) -> str:
        """Name of the kernel that runs after packing."""
        assert self.packed is not None
        return self.packed.name if isinstance(self.packed, Kernel) else self.packed.kernel

    @property
    def quantizes_inputs(self) -> bool:
        """Whether it computes with inputs that are rounded to codes."""
        return self.input_quantizer is not None or (self.packed is not None and self.packed.quantizes_inputs)

    def refresh(self) -> None:
        """Recompute stored bits and decoded weight after the QTensor's floats changed; before `pack` or `simulate`."""
        assert isinstance(self.packed, QTensor)
        self.stored_bits = self.packed.stored_bits
        if self.decoded is not None:
            self.decoded = self.packed.dequantize(self.dtype)

    def pack(self) -> QuantLinear:
        """Keep only the weight in the layout of its kernel, or the QTensor if no kernel supports it."""
        self.decoded = None
        assert isinstance(self.packed, QTensor)
        device = next(self.packed.buffers()).device
        self.packed = choose(self.packed, self.input_quantizer, self.dtype, device) or self.packed
        return self

    def simulate(self) -> QuantLinear:
        """Keep only the decoded weight; a QTensor that quantizes its inputs has no decoded weight and is kept."""
        if self.decoded is not None:
            self.packed = None
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        packed, bias = self._modules["packed"], self._buffers["bias"]  # `self.packed` would search all attributes first
        if isinstance(packed, Kernel) and (packed.quantizes_inputs or self.input_quantizer is None):
            return packed.forward(inputs, bias)  # without a module's hooks, which cost as much as a small product
        return self._general(inputs)

    def _general(self, inputs: Tensor) -> Tensor:
        """Any combination of a quantizer of the inputs with a decoded weight, a QTensor or a kernel."""
        quantizes_inputs = self.decoded is None and self.packed is not None and self.packed.quantizes_inputs
        if self.input_quantizer is not None and not quantizes_inputs:
            inputs = self.input_quantizer(inputs)
        if self.decoded is not None:
            return F.linear(inputs, self.decoded, self.bias)
        if isinstance(self.packed, QTensor):
            return self.packed.linear(inputs, self.bias)
        assert self.packed is not None
        outputs: Tensor = self.packed(inputs, self.bias)
        return outputs


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module called `name` by `new`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the modules of the same names by `modules`; on exit, also after an error, put the originals back."""
    originals = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            replace(model, name, module)
        yield
    finally:
        for name, module in originals.items():
            replace(model, name, module)


def stored_bytes(model: nn.Module, decoded: Mapping[nn.Parameter, int] | None = None) -> int:
    """Bytes of a model's weights as stored: packed linears by their bits, every other parameter once.

    Buffers that are computed rather than stored (rotary frequencies) are not weights. `decoded` are parameters with the
    values of quantized weights, and the bits that these take.
    """
    sizes: dict[int, int] = {}
    bits = decoded or {}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            bias = module.bias.nbytes if module.bias is not None else 0
            static = sum(buffer.nbytes for buffer in module.input_quantizer.buffers()) if module.input_quantizer else 0
            sizes[id(module)] = module.stored_bits // 8 + bias + static
    for parameter in model.parameters():
        sizes[id(parameter)] = bits[parameter] // 8 if parameter in bits else parameter.nbytes
    return sum(sizes.values())


def resident_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers in memory, in the layout of the kernels that run them."""
    strided, other = dict[int, int](), 0
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            strided[storage.data_ptr()] = storage.nbytes()
        else:  # a layout of a kernel's library: it shares no memory
            other += tensor.nbytes
    return sum(strided.values()) + other
