"""QuantLinear: a linear that runs from its stored bits, with its input quantized where the scheme says so."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.core import grid
from harness.core.qtensor import QTensor
from harness.core.scheme import ActivationFormat


class InputQuantizer(nn.Module):
    """Moves a linear's input to the grid of an activation format, found at run time or calibrated.

    A static format takes `bounds`, the smallest and largest input that calibration saw.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, fmt: ActivationFormat, bounds: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.fmt = fmt
        if bounds is not None:
            scale, zero_point = grid.range_params(*bounds, fmt)
            self.register_buffer("scale", scale)
            self.register_buffer("zero_point", zero_point)

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs` (..., K) snapped to the grid, in their dtype."""
        values = inputs.to(grid.compute_dtype(inputs))
        if self.fmt.threshold is not None:
            outliers = (values.abs() >= self.fmt.threshold).any(-2 if values.dim() > 1 else 0, keepdim=True)
            rest = values.masked_fill(outliers, 0)
            snapped = grid.snap(rest, *grid.range_params(*self._bounds(rest), self.fmt), self.fmt)
            return torch.where(outliers, values, snapped).to(inputs.dtype)
        if self.fmt.dynamic:
            scale, zero_point = grid.range_params(*self._bounds(values), self.fmt)
        else:
            scale, zero_point = self.scale.to(values.dtype), self.zero_point.to(values.dtype)
        return grid.snap(values, scale, zero_point, self.fmt).to(inputs.dtype)

    def _bounds(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value a token, or a sequence: all axes but the batch's."""
        if self.fmt.granularity == "token":
            axes: tuple[int, ...] = (-1,)
        else:
            axes = tuple(range(1 if values.dim() > 2 else 0, values.dim()))
        return values.amin(axes, keepdim=True), values.amax(axes, keepdim=True)


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
