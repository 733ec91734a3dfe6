"""What every writer of a quantized checkpoint gives: whether its format holds a scheme, and the files of a model."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from harness.core import IntWeight, QTensor, Scheme
from harness.models.source import Source
from harness.nn import QuantLinear


@dataclass(frozen=True)
class Quantized:
    """A quantized model that is to be written.

    model    with its linears quantized
    weights  the quantized weight of each of these linears, by name, on any device
    scheme   of the run
    source   of the float model
    """

    model: nn.Module
    weights: Mapping[str, QTensor]
    scheme: Scheme
    source: Source

    def linears(self) -> Iterator[tuple[str, QTensor]]:
        """Name and weight of each quantized linear, on the CPU."""
        for name, weight in self.weights.items():
            yield name, copy.deepcopy(weight).cpu() if next(weight.buffers()).is_cuda else weight


class Writer(ABC):
    """One file format.

    name  the value of `export`
    """

    name: ClassVar[str]

    @abstractmethod
    def check(self, scheme: Scheme) -> None:
        """Check a scheme before anything is computed.

        Raises: ValueError if the format cannot hold it.
        """

    def check_model(self, source: Source) -> None:  # noqa: B027  # most formats hold every model
        """Check a model, before its weights are loaded.

        Raises: ValueError if the format cannot hold it.
        """

    @abstractmethod
    def write(self, quantized: Quantized, folder: Path) -> None:
        """Write the model into an existing folder.

        Raises: ValueError if the format cannot hold a weight; OSError, SafetensorError if the folder is not writable.
        """

    def refuse(self, key: str, value: object, expected: str) -> ValueError:
        """The error of a setting that the format cannot hold."""
        return ValueError(f"export={self.name} cannot hold {key}={value}; expected {expected}, or export=native")

    def integers(self, scheme: Scheme) -> IntWeight:
        """The format of the weights of a scheme, an integer grid in groups or rows with integer zero points.

        Raises: ValueError if it is another one.
        """
        fmt = scheme.weight
        if not isinstance(fmt, IntWeight):
            raise self.refuse("scheme", scheme.name, "an integer grid")
        if fmt.granularity == "tensor":
            raise self.refuse("scheme.weight.granularity", "tensor", "channel or group")
        if not fmt.symmetric and fmt.zero_point == "float":
            raise self.refuse("scheme.weight.zero_point", "float", "integer")
        return fmt

    def plain_integers(self, scheme: Scheme, widths: Sequence[int]) -> IntWeight:
        """Likewise without activations, with float16 scales and one of the `widths`.

        Raises: ValueError if it is another one.
        """
        fmt = self.integers(scheme)
        if scheme.activation is not None:
            raise self.refuse("scheme", scheme.name, "a scheme without activations")
        if fmt.bits not in widths:
            raise self.refuse("bits", fmt.bits, ", ".join(map(str, widths)))
        if fmt.scale_dtype != "float16":
            raise self.refuse("scheme.weight.scale_dtype", fmt.scale_dtype, "float16")
        return fmt


def zero_points(weight: Any) -> Tensor:
    """Integer zero points (N, G) of an integer weight, the middle code of a symmetric one."""
    points: Tensor = weight.zero_points().int()
    return points.expand(weight.shape[0], -1)


def float_tensors(model: nn.Module, quantized: Collection[str]) -> dict[str, Tensor]:
    """The parameters that stay floats, on the CPU, tied ones once, and the biases of the linears called `quantized`."""
    tensors = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    tensors = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in quantized}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and module.bias is not None:
            tensors[f"{name}.bias"] = module.bias.cpu()
    return tensors
