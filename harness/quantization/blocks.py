"""Blocks for methods that solve one as a whole: its weights, states, and a run with other weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.calibration import SAME_FUNCTION, Reference, Stream, relative_error, within
from harness.core import Block, Scheme, Stats
from harness.core.block import Run
from harness.core.formats import InputQuantizer
from harness.models import weight_of
from harness.nn import standing_in
from harness.quantization.install import input_quantizer_of


def block_of(
    model: nn.Module, stream: Stream, reference: Reference, schemes: Mapping[str, Scheme], stats: Mapping[str, Stats]
) -> Block:
    """The block at the position of `stream`, whose linears with `schemes` will be quantized; all by full name."""
    linears = {name: model.get_submodule(name) for name in schemes}
    quantizers = {name: input_quantizer_of(schemes[name], stats[name]) for name in schemes}
    weights = {name: weight_of(linear).detach() for name, linear in linears.items()}
    run = _run(stream, linears, quantizers)
    if not _takes_batches(run, weights, stream.states):
        run = _one_by_one(run)
    return Block(weights, schemes, stats, stream.states, reference.states, reference.targets, run)


def _run(stream: Stream, linears: Mapping[str, nn.Module], quantizers: Mapping[str, InputQuantizer | None]) -> Run:
    def run(weights: Mapping[str, Tensor], states: Tensor) -> Tensor:
        with ExitStack() as stack:
            for name, weight in weights.items():
                bias = getattr(linears[name], "bias", None)
                stack.enter_context(standing_in(linears[name], _forward(weight, bias, quantizers[name])))
            return stream.run_to_train(states)

    return run


def _forward(weight: Tensor, bias: Tensor | None, quantizer: InputQuantizer | None) -> Callable[[Tensor], Tensor]:
    return lambda inputs: F.linear(straight_through(quantizer, inputs), weight, bias)


def straight_through(quantizer: InputQuantizer | None, inputs: Tensor) -> Tensor:
    """Rounded inputs, which pass gradients on as if they were not rounded; unchanged without a quantizer."""
    return inputs if quantizer is None else inputs + (quantizer(inputs.detach()) - inputs.detach())


@torch.no_grad()
def _takes_batches(run: Run, weights: Mapping[str, Tensor], states: list[Tensor]) -> bool:
    """Whether the block computes the same for two sequences in one call as for each alone: measured."""
    if len(states) < 2:
        return True
    alone = torch.cat([run(weights, each) for each in states[:2]])
    try:
        together = run(weights, torch.cat(states[:2]))
    except (RuntimeError, ValueError):  # of the model's own code, which was written for the batch of the first call
        return False
    return within(relative_error(together, alone), SAME_FUNCTION[alone.dtype])


def _one_by_one(run: Run) -> Run:
    return lambda weights, states: torch.cat([run(weights, each[None]) for each in states])
