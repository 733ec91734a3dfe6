"""A model that another program quantized, measured like any other row.

The linears are those of the folder that `model.path` names: their codes, scales and input formats as the file has them.
`model.base` names the float model, with which they are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.core import Prequantized


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Prequantized):
    """Takes the codes of a checkpoint as they are."""
