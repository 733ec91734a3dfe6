"""Schemes: the formats of a linear's weight and input. Numbers only, no algorithm."""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness.core.formats.floating_activation import FloatActivation
from harness.core.formats.floating_weight import FloatWeight
from harness.core.formats.integer_activation import IntActivation
from harness.core.formats.integer_weight import IntWeight

NATIVE = "native"  # name of the scheme of methods that define their format themselves


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A weight format and, if inputs are quantized too, an activation format. `name` labels the scheme in tables."""

    name: str
    weight: IntWeight | FloatWeight
    activation: IntActivation | FloatActivation | None = None

    def at(self, bits: int) -> Scheme:
        """The same scheme with another number of `bits` for the weights."""
        return replace(self, weight=self.weight.at(bits))


def require_native(scheme: Scheme, what: str) -> None:
    """Check that `scheme` is `native`, for a method that defines its format itself; `what` names that format.

    Raises: ValueError if it is another scheme.
    """
    if scheme.name != NATIVE:
        raise ValueError(f"scheme={scheme.name} is another format than {what}; use scheme={NATIVE}")
