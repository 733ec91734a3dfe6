"""What a quantization leaves for the record, and for what runs after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from harness.core import QTensor

Row = dict[str, Any]


@dataclass
class Result:
    """What the record keeps of a quantization: a row for each linear of the blocks, warnings, names of kernels.

    `weights` are the QTensors by their linear's name, where the run is to save them. `floats` are the float linears
    that the quantized ones took the place of, as rewrites left them, where the run is to be analysed; `renamed` says
    what the rewrites call each linear, old name to new.
    """

    layers: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    kernels: set[str] = field(default_factory=set)
    weights: dict[str, QTensor] = field(default_factory=dict)
    floats: dict[str, nn.Module] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, of all linears in decoder blocks, those left float included."""
        bits = sum(layer["stored_bits"] for layer in self.layers)
        return float(bits / sum(layer["shape"][0] * layer["shape"][1] for layer in self.layers))
