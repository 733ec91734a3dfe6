"""The contract between the harness and a quantization method: three optional hooks.

A method is a frozen, keyword-only dataclass. Its fields are its YAML's keys and the command line's options.
A hook is a pure function of its arguments and fields: no printing, globals, devices or global seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from harness.core.qtensor import QTensor
from harness.core.scheme import Scheme
from harness.core.stats import Stat, Stats


@dataclass(frozen=True)
class InputGroup:
    """Linears of one decoder block that read the very same input tensor, in execution order.

    `linears` maps full module names to the modules; every weight is reached by `weight_of(module)`.
    """

    linears: dict[str, nn.Module]

    @property
    def name(self) -> str:
        return " + ".join(self.linears)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods; override what the idea needs and inherit the rest, which does nothing.

    `needs` names the statistics of the inputs to collect before `transform` and `quantize`.
    """

    needs: ClassVar[Sequence[type[Stat]]] = ()

    def prepare(self, model: nn.Module) -> None:
        """Rewrite the float model once, without data (rotations). Must keep the function that it computes."""

    def transform(self, group: InputGroup, stats: Stats) -> None:
        """Rewrite the weights around one input group. Must keep the function that the model computes."""

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        """Choose the codes of one weight (N, K), which must not be changed."""
        raise NotImplementedError(f"{type(self).__name__} does not quantize; a later step of the method has to")


def overrides(method: Method | type[Method], hook: str) -> bool:
    """Whether a method brings a `hook` of its own."""
    cls = method if isinstance(method, type) else type(method)
    return getattr(cls, hook) is not getattr(Method, hook)
