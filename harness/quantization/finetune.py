"""Trains the floats of one quantized block to reproduce the outputs of the same block of the float model.

Codes stay fixed. Training changes the values of the QTensors' tuners (codebooks, scales, sign vectors) and the
block's norms. The block reads the outputs of the quantized blocks before it; its targets are the float block's
outputs for float inputs, so that it also corrects the errors of the blocks before. Some sequences are held out: of
the states after each epoch and before training, the one with the lowest error on them is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.core import Finetune
from harness.quantization.tuning import Floats, Tuned, train, tuned, tunings_of, vectors_of

_TINY = 1e-12  # smallest squared norm of a token


def finetune(
    block: nn.Module,
    run: Callable[[Tensor], Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    options: Finetune,
) -> Tuned | None:
    """Train `block` in place; `run` returns its output states for input states (1, T, D).

    `inputs` are the block's input states of each sequence, `targets` the output states that it should compute. The
    order of the sequences is random, and the same in every run.
    Returns: the error before and after training; None if the block has no tuner, so nothing to train.
    """
    tunings = list(tunings_of(block))
    if not tunings:
        return None
    with vectors_of([block]) as floats, tuned(tunings):
        return train(_Task(tunings, floats, run, inputs, targets), len(inputs), options)


@dataclass
class _Task(Floats):
    """The mean relative squared error per token of a block's outputs."""

    run: Callable[[Tensor], Tensor]
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]

    def differentiate(self, chosen: Sequence[int]) -> None:
        self._loss(chosen).backward()

    @torch.no_grad()
    def error(self, chosen: Sequence[int]) -> float:
        return float(self._loss(chosen))

    def _loss(self, chosen: Sequence[int]) -> Tensor:
        for tuning in self.tunings:
            tuning.decode()
        return torch.stack([_token_error(self.run(self.inputs[i]), self.targets[i]) for i in chosen]).mean()


def _token_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |output - target|^2 / max(|output|^2, |target|^2), states (1, T, D), in float32.

    Relative, because the norms that read the stream divide each token by its size. An absolute error would train only
    for the few tokens with massive activations, or for those whose massive activations quantization adds or removes.
    """
    exact, actual = target.float(), output.float()
    size = torch.maximum(exact.square().sum(-1), actual.detach().square().sum(-1)).clamp(min=_TINY)
    return ((actual - exact).square().sum(-1) / size).mean()
