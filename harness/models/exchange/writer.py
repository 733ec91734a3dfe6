"""What every writer of a quantized checkpoint gives: whether its format holds a scheme, and the tensors of a linear."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from harness.core import IntWeight, QTensor, Scheme
from harness.core.formats import InputQuantizer
from harness.models.exchange.reader import Tensors

Linears = Mapping[str, tuple[QTensor, InputQuantizer | None]]  # each with what quantizes its inputs, by name


class Writer(ABC):
    """The layout of one file format.

    name  the value of `export`
    """

    name: ClassVar[str]

    @abstractmethod
    def check(self, scheme: Scheme) -> None:
        """Check a scheme before anything is computed.

        Raises: ValueError if the format cannot hold it.
        """

    def fitted(self, linears: Linears) -> Writer:
        """The variant of the format that holds these linears."""
        return self

    @abstractmethod
    def section(self, scheme: Scheme, linears: Linears, floats: list[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json; `floats` are the linears that stay floats."""

    @abstractmethod
    def parts(self, weight: QTensor, inputs: InputQuantizer | None) -> Tensors:
        """The tensors of a linear, by the part of their name behind that of the linear.

        Raises: ValueError if the format cannot hold the weight.
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
