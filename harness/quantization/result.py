"""The result of quantizing a model, for the record and for later stages."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from harness.core import QTensor
from harness.nn import QuantLinear
from harness.quantization.tuning import Tuned

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Number and stored bits of all weights in matrices of the blocks, and how many of them are quantized.

    Matrices are linears, fused experts (E, N, K), routers and every other parameter of two or more dimensions; one
    that several blocks share counts once.
    """

    weights: int = 0
    stored_bits: int = 0
    quantized: int = 0


def sizes(
    blocks: Iterable[nn.Module], copies: Collection[nn.Module] = (), decoded: Mapping[nn.Parameter, int] | None = None
) -> Sizes:
    """The sizes of the matrices in `blocks`, in their present state, without linears in `copies`.

    `decoded` are parameters with the values of quantized weights, and the bits of these; they count as quantized.
    """
    decoded = decoded or {}
    modules = {module for block in blocks for module in block.modules()}
    linears = [module for module in modules if isinstance(module, QuantLinear) and module not in copies]
    own = {parameter for module in modules for parameter in module.parameters(recurse=False)}
    floats = [parameter for parameter in own if parameter.dim() >= 2]
    quantized = sum(math.prod(linear.shape) for linear in linears)
    return Sizes(
        weights=quantized + sum(parameter.numel() for parameter in floats),
        stored_bits=sum(linear.stored_bits for linear in linears)
        + sum(decoded.get(parameter, 8 * parameter.nbytes) for parameter in floats),
        quantized=quantized + sum(parameter.numel() for parameter in floats if parameter in decoded),
    )


@dataclass
class Result:
    """The result of quantizing a model.

    layers    the record's row of each linear in the blocks
    warnings  for the record
    kernels   names of the kernels that run the packed weights
    weights   QTensors by name of the linear, if the run saves them
    floats    the replaced float linears after all rewrites, by name, if the run is analysed
    renamed   name in the float model -> name after all rewrites, of each linear that was to be quantized
    sizes     of all matrices in the blocks
    decoded   parameters with the values of quantized weights, which no packed linear holds -> bits of these weights
    joined    number of packed linears that are computed together with others of the same inputs
    distilled held-out KL before and after the whole model was trained; None: it was not
    rotated   the same of a trained rotation, with rounded inputs and float weights
    """

    layers: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    kernels: set[str] = field(default_factory=set)
    weights: dict[str, QTensor] = field(default_factory=dict)
    floats: dict[str, nn.Module] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=Sizes)
    decoded: dict[nn.Parameter, int] = field(default_factory=dict)
    joined: int = 0
    distilled: Tuned | None = None
    rotated: Tuned | None = None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits divided by weights, over all matrices in the blocks, including those that stay float."""
        return self.sizes.stored_bits / self.sizes.weights

    @property
    def quantized_share(self) -> float:
        """Share of the weights in matrices of the blocks that is quantized."""
        return self.sizes.quantized / self.sizes.weights

    @property
    def total_weight_error(self) -> float | None:
        """sqrt(sum |W' - W|^2 / sum |W|^2) over all quantized linears; None if there is none."""
        rows = [layer for layer in self.layers if "weight_norm" in layer]
        size = sum(row["weight_norm"] ** 2 for row in rows)
        return math.sqrt(sum((row["weight_error"] * row["weight_norm"]) ** 2 for row in rows) / size) if size else None
