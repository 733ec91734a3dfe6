"""Trains the floats of one quantized block to reproduce the outputs of the same block of the float model.

Codes stay fixed. Training changes the values of the QTensors' tuners (codebooks, scales, sign vectors) and the
block's norms. The block reads the outputs of the quantized blocks before it; its targets are the float block's
outputs for float inputs, so that it also corrects the errors of the blocks before. Some sequences are held out: of
the states after each epoch and before training, the one with the lowest error on them is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.core import Finetune, QTensor
from harness.core.formats import Tuner
from harness.nn import QuantLinear, standing_in

_HELD_OUT = 8  # one sequence in 8 is held out
_TINY = 1e-12  # smallest squared norm of a token


@dataclass(frozen=True)
class Tuned:
    """Mean relative squared error per token on the held-out sequences, before training and of the state kept."""

    before: float
    after: float


class _Tuning:
    """A quantized linear that computes with the values under training instead of its stored weight."""

    def __init__(self, linear: QuantLinear, tuner: Tuner) -> None:
        self.linear, self.tuner = linear, tuner
        self.values = {name: value.clone().requires_grad_() for name, value in tuner.values.items()}
        self.weight = torch.empty(0)

    def decode(self) -> None:
        """Decode the weight from the present values; once a step, for all sequences of the step."""
        if self.tuner.linear is None:
            self.weight = self.tuner.weight(self.values).to(self.linear.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.tuner.linear is None:
            return F.linear(inputs, self.weight, self.linear.bias)
        outputs = self.tuner.linear(self.values, inputs.float()).to(inputs.dtype)
        return outputs if self.linear.bias is None else outputs + self.linear.bias


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
    tunings = list(_tunings(block))
    if not tunings:
        return None
    held_out = [i for i in range(len(inputs)) if len(inputs) > 1 and i % _HELD_OUT == _HELD_OUT - 1]
    trained = [i for i in range(len(inputs)) if i not in held_out]
    with _training(block, tunings) as floats:
        task = _Task(run, inputs, targets, tunings, floats)
        best = task.state()
        before = lowest = task.error(held_out or trained)
        steps = _Steps(task, options, -(-len(trained) // options.batch) * options.epochs)
        generator = torch.Generator().manual_seed(0)
        for _ in range(options.epochs):
            order = torch.randperm(len(trained), generator=generator).tolist()
            for start in range(0, len(order), options.batch):
                steps.take([trained[i] for i in order[start : start + options.batch]])
            error = task.error(held_out or trained)
            if error < lowest:
                lowest, best = error, task.state()
        task.restore(best)
    if lowest == before:  # storing sign vectors that did not change would only take more bits
        return Tuned(before, before)
    for tuning in tunings:
        tuning.tuner.accept({name: value.detach() for name, value in tuning.values.items()})
        tuning.linear.refresh()
    return Tuned(before, lowest)


@dataclass
class _Task:
    """The tensors that are trained, and their loss."""

    run: Callable[[Tensor], Tensor]
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    tunings: Sequence[_Tuning]
    floats: Sequence[nn.Parameter]

    @property
    def tensors(self) -> list[Tensor]:
        return [*(value for tuning in self.tunings for value in tuning.values.values()), *self.floats]

    def state(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self.tensors]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        for tensor, saved in zip(self.tensors, state, strict=True):
            tensor.copy_(saved)

    def loss(self, indices: Sequence[int]) -> Tensor:
        """Mean relative squared error per token of the sequences `indices`."""
        for tuning in self.tunings:
            tuning.decode()
        return torch.stack([_token_error(self.run(self.inputs[i]), self.targets[i]) for i in indices]).mean()

    @torch.no_grad()
    def error(self, indices: Sequence[int]) -> float:
        return float(self.loss(indices))


class _Steps:
    """Adam with a learning rate that falls to zero along half a cosine, over `count` steps."""

    def __init__(self, task: _Task, options: Finetune, count: int) -> None:
        self.task = task
        groups = [{"params": [tensor], "lr": options.lr * _rms(tensor)} for tensor in task.tensors]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, count)

    def take(self, indices: Sequence[int]) -> None:
        with torch.enable_grad():
            self.optimizer.zero_grad()
            self.task.loss(indices).backward()
        self.optimizer.step()
        self.schedule.step()


def _token_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |output - target|^2 / max(|output|^2, |target|^2), states (1, T, D), in float32.

    Relative, because the norms that read the stream divide each token by its size. An absolute error would train only
    for the few tokens with massive activations, or for those whose massive activations quantization adds or removes.
    """
    exact, actual = target.float(), output.float()
    size = torch.maximum(exact.square().sum(-1), actual.detach().square().sum(-1)).clamp(min=_TINY)
    return ((actual - exact).square().sum(-1) / size).mean()


def _rms(tensor: Tensor) -> float:
    """Root mean square of a tensor; 1 for zeros."""
    return float(tensor.detach().float().square().mean().sqrt()) or 1.0


def _tunings(block: nn.Module) -> Iterator[_Tuning]:
    for module in block.modules():
        if isinstance(module, QuantLinear) and isinstance(module.packed, QTensor):
            tuner = module.packed.tuner()
            if tuner is not None:
                yield _Tuning(module, tuner)


@contextmanager
def _training(block: nn.Module, tunings: Sequence[_Tuning]) -> Iterator[list[nn.Parameter]]:
    """Let the block's linears compute with their tuners' values; of its parameters, only vectors get gradients.

    Yields: these vectors. At the end everything is as before.
    """
    requires_grad = {parameter: parameter.requires_grad for parameter in block.parameters()}
    floats = [parameter for parameter in requires_grad if parameter.dim() == 1]
    try:
        for parameter in requires_grad:
            parameter.requires_grad_(parameter.dim() == 1)
        with _standing_in(tunings):
            yield floats
    finally:
        for parameter, previous in requires_grad.items():
            parameter.requires_grad_(previous)
            parameter.grad = None


@contextmanager
def _standing_in(tunings: Sequence[_Tuning]) -> Iterator[None]:
    if not tunings:
        yield
        return
    with standing_in(tunings[0].linear, tunings[0].forward), _standing_in(tunings[1:]):
        yield
