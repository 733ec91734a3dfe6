"""Schemes: the formats of a linear's weight and input. Numbers only, no algorithm."""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness.core.formats.floating_activation import FloatActivation
from harness.core.formats.floating_weight import FloatWeight
from harness.core.formats.integer_activation import IntActivation
from harness.core.formats.integer_weight import IntWeight
from harness.core.formats.learned_weight import LearnedWeight
from harness.core.formats.levels_weight import LevelsWeight

Weight = IntWeight | FloatWeight | LevelsWeight | LearnedWeight


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A weight format and, if inputs are quantized too, an activation format. `name` labels the scheme in tables.

    weight  None: the method has codes that are no format of single values, such as a lattice
    """

    name: str
    weight: Weight | None
    activation: IntActivation | FloatActivation | None = None

    @property
    def format(self) -> Weight:
        """The weight format.

        Raises: ValueError if the scheme leaves it to the method.
        """
        if self.weight is None:
            raise ValueError(
                f"scheme={self.name} leaves the format of weights to the method; use another scheme, such as "
                "scheme=group64"
            )
        return self.weight

    def at(self, bits: int) -> Scheme:
        """The same scheme with another number of `bits` for the weights.

        Raises: ValueError if the width of the weight format cannot be chosen.
        """
        return replace(self, weight=self.format.at(bits))


def require_none(scheme: Scheme, what: str) -> None:
    """Check that `scheme` has no weight format, for a method that has codes of its own; `what` names them.

    Raises: ValueError if it has one.
    """
    if scheme.weight is not None:
        raise ValueError(f"scheme={scheme.name} is another format than {what}; use scheme=none")
