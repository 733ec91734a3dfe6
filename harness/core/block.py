"""A decoder block as a method sees it that solves the block as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from harness.core.scheme import Scheme
from harness.core.stats import Stats

Run = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """One block of the float model, whose linears will be quantized together.

    weights    their weights (N out, K in), by name; must not be changed
    schemes    their schemes, by name
    stats      the statistics of their inputs, by name: those that the method needs
    inputs     input states (1, T, D) of the block, one tensor for each sequence: outputs of the quantized blocks before
    reference  the input states in the float model; the same as `inputs` if calibration propagates the float model's
    targets    the output states of the block in the float model
    run        weights by name and input states (B, T, D) -> output states of the block with these weights, and with
               quantized inputs of its linears if the scheme has a format for them. Differentiable in both arguments;
               rounded inputs pass gradients on unchanged (straight-through).
    """

    weights: Mapping[str, Tensor]
    schemes: Mapping[str, Scheme]
    stats: Mapping[str, Stats]
    inputs: Sequence[Tensor]
    reference: Sequence[Tensor]
    targets: Sequence[Tensor]
    run: Run
