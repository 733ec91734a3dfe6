"""AutoRound: learned rounding and ranges of all linears of a block, by the signs of gradients.

Paper: Cheng et al. 2023, arXiv 2309.05516, equations 3 to 6: W' = s (clip(round(W / s + V + z), 0, Q) - z), with V in
    [-1/2, 1/2] and s, z from the range [beta min W, alpha max W]; all are trained on the squared error of the block's
    output by sign-SGD, with a step that falls to zero. Inputs come from the quantized blocks before, targets from the
    float model, as in the authors' program (intel/auto-round).
Differs: gradients of V, alpha and beta are formulas on the gradient of W', so that rounding needs no graph. A step
    counts as the best by its error relative to that of the start on the same sequences, so that an easy batch is not
    mistaken for a good step. Ranges start where the Hessian's diagonal blocks want them to be clipped, as
    in our GPTQ; the paper's start from minimum and maximum. A range always covers the weights of inputs that were
    silent on the calibration tokens; elsewhere they may fire.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core import Block, FloatWeight, Hessian, IntWeight, Method, MinMax, QTensor, Scheme, Stat, at_least
from harness.core.finite import check_finite
from harness.core.formats import compute_dtype
from harness.core.precision import products
from harness.core.solvers.clip import clipped_ends
from harness.core.solvers.learned_rounding import Rounding
from harness.core.solvers.silent import fill_silent


@dataclass(frozen=True, kw_only=True)
class AutoRound(Method):
    """Rounding and ranges that reproduce the output of each block.

    steps     of sign-SGD for each block
    lr        first step of V, alpha and beta; null: 1 / steps
    batch     sequences of a step
    bfloat16  compute the products of a step in bfloat16; weights and errors stay float32
    clip      start from clipped ranges; false: from minimum and maximum
    seed      of the sequences of each step
    """

    steps: int = 200
    lr: float | None = None
    batch: int = 4
    bfloat16: bool = True
    clip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch")
        at_least(self, 0, "seed")
        if self.lr is not None and not 0 < self.lr <= 1:
            raise ValueError(f"lr={self.lr} is out of range; expected more than 0, up to 1, or null")

    @property
    def needs(self) -> Sequence[type[Stat]]:
        return (MinMax, Hessian) if self.clip else (MinMax,)

    def check(self, scheme: Scheme) -> None:
        _grid(scheme)

    def quantize_block(self, block: Block) -> Mapping[str, QTensor]:
        roundings = {}
        for name, weight in block.weights.items():
            check_finite(weight)
            silent, fmt = block.stats[name][MinMax].absmax == 0, _grid(block.schemes[name])
            H = fill_silent(block.stats[name][Hessian].value)[0] if self.clip else None
            ends = None if H is None else clipped_ends(weight, fmt, H)
            roundings[name] = Rounding(weight, fmt, silent, ends)
        task = _Task(block, roundings, self.bfloat16)
        generator = torch.Generator().manual_seed(self.seed)
        lr, lowest, best = self.lr or 1 / self.steps, math.inf, {name: each.state() for name, each in roundings.items()}
        for step in range(self.steps):
            chosen = torch.randperm(len(block.inputs), generator=generator)[: self.batch].tolist()
            error, gradients = task.gradients(chosen)
            if error < lowest:
                lowest, best = error, {name: each.state() for name, each in roundings.items()}
            for name, rounding in roundings.items():
                rounding.step(gradients[name], lr * (1 - step / self.steps))
        for name, rounding in roundings.items():
            rounding.restore(best[name])
        return {name: rounding.quantized() for name, rounding in roundings.items()}


def _grid(scheme: Scheme) -> IntWeight | FloatWeight:
    """The weight format.

    Raises: ValueError if its values are no multiples of a scale.
    """
    if isinstance(scheme.format, IntWeight | FloatWeight):
        return scheme.format
    raise ValueError(
        f"scheme={scheme.name} has levels in a table, between which rounding is not learned; use integers or small "
        "floats, such as scheme=group64"
    )


class _Task:
    """The error of a block with rounded weights, on some of its sequences."""

    def __init__(self, block: Block, roundings: Mapping[str, Rounding], bfloat16: bool) -> None:
        self._block, self._roundings, self._bfloat16 = block, roundings, bfloat16
        weights = self._weights()
        self._first = [self._error(weights, [i]).item() for i in range(len(block.inputs))]

    def gradients(self, chosen: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
        """The error on the sequences `chosen` relative to that of the start, and its gradients by weight."""
        weights = {name: weight.requires_grad_() for name, weight in self._weights().items()}
        with torch.enable_grad():
            error = self._error(weights, chosen)
        found = torch.autograd.grad(error, list(weights.values()))
        first = sum(self._first[i] for i in chosen) / len(chosen)
        return error.item() / max(first, 1e-30), dict(zip(weights, found, strict=True))

    def _weights(self) -> dict[str, Tensor]:
        dtype = torch.bfloat16 if self._bfloat16 else None
        return {name: rounding.weight(dtype or rounding.dtype) for name, rounding in self._roundings.items()}

    def _error(self, weights: Mapping[str, Tensor], chosen: Sequence[int]) -> Tensor:
        """Mean squared error of the block's output."""
        states, targets = (torch.cat([each[i] for i in chosen]) for each in (self._block.inputs, self._block.targets))
        with products(states.device, self._bfloat16):
            outputs = self._block.run(weights, states)
        return F.mse_loss(outputs.to(compute_dtype(targets)), targets.to(compute_dtype(targets)))
