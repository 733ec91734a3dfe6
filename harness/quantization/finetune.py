"""Train the floats of one quantized block so that it gives what the float model's block gives.

Codes stay; what moves are the values that the QTensors' tuners name (codebooks, scales, sign vectors) and the block's
norms. The block sees the inputs that quantized blocks before it hand on, and its target is the float
model's output of float inputs, so that it makes up for their errors as well. Some sequences are held out: the epoch
with the lowest error on them is kept, the state before training included.
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

_HELD_OUT = 8  # one sequence of so many
_TINY = 1e-12  # of a token's square


@dataclass(frozen=True)
class Tuned:
    """Mean relative squared error of a token on held-out sequences, before training and of what was kept."""

    before: float
    after: float


class _Tuning:
    """A quantized linear whose weight follows its tuner's values."""

    def __init__(self, linear: QuantLinear, tuner: Tuner) -> None:
        self.linear, self.tuner = linear, tuner
        self.values = {name: value.clone().requires_grad_() for name, value in tuner.values.items()}
        self.weight = torch.empty(0)

    def decode(self) -> None:
        """Follow the values as they are now; once a step, for all of its sequences."""
        if self.tuner.linear is None:
            self.weight = self.tuner.weight(self.values).to(self.linear.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.tuner.linear is None:
            return F.linear(inputs, self.weight, self.linear.bias)
        found = self.tuner.linear(self.values, inputs.float()).to(inputs.dtype)
        return found if self.linear.bias is None else found + self.linear.bias


def finetune(
    block: nn.Module,
    run: Callable[[Tensor], Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    how: Finetune,
) -> Tuned | None:
    """Train `block` in place, where `run` gives its output for states (1, T, D); None where nothing can be trained.

    `inputs` and `targets` are the states of each sequence before and after it. Sequences come in an order of their own,
    the same in every run.
    """
    tunings = list(_tunings(block))
    if not tunings:
        return None
    held = [i for i in range(len(inputs)) if len(inputs) > 1 and i % _HELD_OUT == _HELD_OUT - 1]
    seen = [i for i in range(len(inputs)) if i not in held]
    with _training(block, tunings) as floats:
        task = _Task(run, inputs, targets, tunings, floats)
        best = task.state()
        before = lowest = task.error(held or seen)
        steps = _Steps(task, how, -(-len(seen) // how.batch) * how.epochs)
        generator = torch.Generator().manual_seed(0)
        for _ in range(how.epochs):
            order = torch.randperm(len(seen), generator=generator).tolist()
            for start in range(0, len(order), how.batch):
                steps.take([seen[i] for i in order[start : start + how.batch]])
            error = task.error(held or seen)
            if error < lowest:
                lowest, best = error, task.state()
        task.restore(best)
    if lowest == before:  # sign vectors that stayed as they were need no more bits
        return Tuned(before, before)
    for tuning in tunings:
        tuning.tuner.accept({name: value.detach() for name, value in tuning.values.items()})
        tuning.linear.refresh()
    return Tuned(before, lowest)


@dataclass
class _Task:
    """What is trained, and how far it is from its target."""

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
        for tensor, kept in zip(self.tensors, state, strict=True):
            tensor.copy_(kept)

    def loss(self, indices: Sequence[int]) -> Tensor:
        """Mean over the tokens of some sequences of their relative squared error."""
        for tuning in self.tunings:
            tuning.decode()
        return torch.stack([_far(self.run(self.inputs[i]), self.targets[i]) for i in indices]).mean()

    @torch.no_grad()
    def error(self, indices: Sequence[int]) -> float:
        return float(self.loss(indices))


class _Steps:
    """Adam, whose steps shrink to nothing along half a cosine."""

    def __init__(self, task: _Task, how: Finetune, count: int) -> None:
        self.task = task
        groups = [{"params": [tensor], "lr": how.lr * _size(tensor)} for tensor in task.tensors]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, count)

    def take(self, indices: Sequence[int]) -> None:
        with torch.enable_grad():
            self.optimizer.zero_grad()
            self.task.loss(indices).backward()
        self.optimizer.step()
        self.schedule.step()


def _far(found: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |found - target|^2 / |larger of the two|^2, states (1, T, D) in float32.

    What reads the stream divides each token by its size. Without that, training would be for the few tokens of massive
    activations alone, or for those that quantization made or unmade.
    """
    exact, given = target.float(), found.float()
    size = torch.maximum(exact.square().sum(-1), given.detach().square().sum(-1)).clamp(min=_TINY)
    return ((given - exact).square().sum(-1) / size).mean()


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().float().square().mean().sqrt()) or 1.0


def _tunings(block: nn.Module) -> Iterator[_Tuning]:
    for module in block.modules():
        if isinstance(module, QuantLinear) and isinstance(module.packed, QTensor):
            tuner = module.packed.tuner()
            if tuner is not None:
                yield _Tuning(module, tuner)


@contextmanager
def _training(block: nn.Module, tunings: Sequence[_Tuning]) -> Iterator[list[nn.Parameter]]:
    """The block with its linears following their tuners, and gradients for its vectors alone."""
    asked = {parameter: parameter.requires_grad for parameter in block.parameters()}
    floats = [parameter for parameter in asked if parameter.dim() == 1]
    try:
        for parameter in asked:
            parameter.requires_grad_(parameter.dim() == 1)
        with _standing_in(tunings):
            yield floats
    finally:
        for parameter, wanted in asked.items():
            parameter.requires_grad_(wanted)
            parameter.grad = None


@contextmanager
def _standing_in(tunings: Sequence[_Tuning]) -> Iterator[None]:
    if not tunings:
        yield
        return
    with standing_in(tunings[0].linear, tunings[0].forward), _standing_in(tunings[1:]):
        yield
