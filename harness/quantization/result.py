"""The result of quantizing a model, for the record and for later stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from harness.core import QTensor

Row = dict[str, Any]


@dataclass
class Result:
    """The result of quantizing a model.

    layers    the record's row of each linear in the blocks
    warnings  for the record
    kernels   names of the kernels that run the packed weights
    weights   QTensors by name of the linear, if the run saves them
    floats    the replaced float linears after all rewrites, by name, if the run is analysed
    renamed   name in the float model -> name after all rewrites, of each linear that was to be quantized
    """

    layers: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    kernels: set[str] = field(default_factory=set)
    weights: dict[str, QTensor] = field(default_factory=dict)
    floats: dict[str, nn.Module] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits divided by weights, over all linears in decoder blocks, including those that stay float."""
        bits = sum(layer["stored_bits"] for layer in self.layers)
        return float(bits / sum(layer["shape"][0] * layer["shape"][1] for layer in self.layers))
