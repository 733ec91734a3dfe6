"""The base class of methods whose models were quantized by another program, so that no hook is called."""

from __future__ import annotations

from dataclasses import dataclass

from harness.core.method import Method
from harness.core.scheme import Scheme, require_none


@dataclass(frozen=True, kw_only=True)
class Prequantized(Method):
    """The codes are those of the checkpoint that `model.path` names; the scheme is `none`."""

    def check(self, scheme: Scheme) -> None:
        require_none(scheme, "that of a checkpoint")
