"""Training with held-out sequences, and of quantized linears: what blocks, whole models and rotations share."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.core import QTensor
from harness.core.formats import Tuner, weight_tuner
from harness.nn import QuantLinear, standing_in
from harness.quantization.blocks import straight_through
from harness.utils.progress import Track, silent

_HELD_OUT = 8  # one sequence in 8 is held out


class Tuning:
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
        """The linear with the weight that was decoded last."""
        inputs = straight_through(self.linear.input_quantizer, inputs)
        if self.tuner.linear is None:
            return F.linear(inputs, self.weight, self.linear.bias)
        outputs = self.tuner.linear(self.values, inputs.float()).to(inputs.dtype)
        return outputs if self.linear.bias is None else outputs + self.linear.bias

    def forward_anew(self, inputs: Tensor) -> Tensor:
        """The linear with the present values; its weight is in memory no longer than its graph."""
        self.decode()
        outputs, self.weight = self.forward(inputs), torch.empty(0)
        return outputs

    def accept(self) -> None:
        """Store the present values."""
        self.tuner.accept({name: value.detach() for name, value in self.values.items()})
        self.linear.refresh()


class Settings(Protocol):
    """Passes over the sequences, Adam's step as a share of each tensor's root mean square, and sequences of a step."""

    @property
    def epochs(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def batch(self) -> int: ...


@dataclass(frozen=True)
class Tuned:
    """The loss on the held-out sequences, before training and of the state that was kept."""

    before: float
    after: float


class Steps(ABC):
    """A rule of descent with its state."""

    @abstractmethod
    def take(self, differentiate: Callable[[], object]) -> None:
        """One step by the gradients that `differentiate` adds."""


class Task(ABC):
    """What is trained, and its loss on some of the sequences."""

    @property
    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All that is trained."""

    @abstractmethod
    def accept(self) -> None:
        """Store the present state in the model."""

    def steps(self, lr: float, count: int) -> Steps:
        """A rule for `count` steps; `lr` is that of the settings."""
        return Adam(self.tensors, lr, count)

    @abstractmethod
    def differentiate(self, chosen: Sequence[int]) -> object:
        """Add the gradients of the loss on the sequences `chosen`."""

    @abstractmethod
    def error(self, chosen: Sequence[int]) -> float:
        """The loss on the sequences `chosen`."""

    def state(self) -> list[Tensor]:
        """A copy of all that is trained, for `restore`."""
        return [tensor.detach().clone() for tensor in self.tensors]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Return to an earlier state."""
        for tensor, saved in zip(self.tensors, state, strict=True):
            tensor.copy_(saved)


@dataclass
class Floats(Task):
    """Training of the values of quantized linears, and of other floats of the model."""

    tunings: Sequence[Tuning]
    floats: Sequence[nn.Parameter]

    @property
    def tensors(self) -> list[Tensor]:
        return [*(value for tuning in self.tunings for value in tuning.values.values()), *self.floats]

    def accept(self) -> None:
        for tuning in self.tunings:
            tuning.accept()


def train(task: Task, count: int, settings: Settings, track: Track = silent) -> Tuned:
    """Train on `count` sequences in a random order, the same in every run, and keep the best state.

    Some sequences are held out: of the states after each epoch and before training, the one with the lowest loss on
    them is kept. If it is not the one before training, the task accepts it.
    """
    trained, held_out = _split(count)
    best, before = task.state(), task.error(held_out or trained)
    lowest, progress = before, [f"training, loss {before:.4f}"]
    steps = task.steps(settings.lr, -(-len(trained) // settings.batch) * settings.epochs)
    generator = torch.Generator().manual_seed(0)
    for _ in track(range(settings.epochs), lambda: progress[0], settings.epochs):
        order = [trained[i] for i in torch.randperm(len(trained), generator=generator).tolist()]
        for start in range(0, len(order), settings.batch):
            steps.take(functools.partial(task.differentiate, order[start : start + settings.batch]))
        error = task.error(held_out or trained)
        progress[0] = f"training, loss {error:.4f}"
        if error < lowest:
            lowest, best = error, task.state()
    task.restore(best)
    if lowest < before:  # storing sign vectors that did not change would only take more bits
        task.accept()
    return Tuned(before, lowest)


class Adam(Steps):
    """Adam with a learning rate that falls to zero along half a cosine, over `count` steps.

    `lr` is a share of the root mean square of each tensor.
    """

    def __init__(self, tensors: Sequence[Tensor], lr: float, count: int, fused: bool = False) -> None:
        """`fused` updates a tensor in one pass, with other bits."""
        groups = [{"params": [tensor], "lr": lr * _rms(tensor)} for tensor in tensors]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=fused)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, count)

    def take(self, differentiate: Callable[[], object]) -> None:
        with torch.enable_grad():
            self.optimizer.zero_grad()
            differentiate()
        self.optimizer.step()
        self.schedule.step()


def _split(count: int) -> tuple[list[int], list[int]]:
    """Indices of the sequences that train, and of those that are held out; none if there is only one."""
    held_out = [i for i in range(count) if count > 1 and i % _HELD_OUT == _HELD_OUT - 1]
    return [i for i in range(count) if i not in held_out], held_out


def tunings_of(module: nn.Module, weights: Mapping[nn.Module, Tensor] | None = None) -> Iterator[Tuning]:
    """The quantized linears in a module whose floats can be trained; with their float `weights`, these are too.

    Raises: ValueError for `weights` whose codes are not found by rounding.
    """
    for each in module.modules():
        if isinstance(each, QuantLinear) and isinstance(each.packed, QTensor):
            tuner = weight_tuner(each.packed, weights[each]) if weights else each.packed.tuner()
            if weights and tuner is None:
                raise ValueError(
                    f"weights cannot be trained as {type(each.packed).__name__}, whose codes are not found by "
                    "rounding; use distill, which trains their floats alone"
                )
            if tuner is not None:
                yield Tuning(each, tuner)


@contextmanager
def vectors_of(modules: Iterable[nn.Module]) -> Iterator[list[nn.Parameter]]:
    """Let the vectors among the parameters of modules get gradients, and nothing else, until exit.

    Yields: these vectors, which are norms and biases. At the end everything is as before but their values.
    """
    requires_grad = {each: each.requires_grad for module in modules for each in module.parameters()}
    try:
        for parameter in requires_grad:
            parameter.requires_grad_(parameter.dim() == 1)
        yield [parameter for parameter in requires_grad if parameter.dim() == 1]
    finally:
        for parameter, previous in requires_grad.items():
            parameter.requires_grad_(previous)
            parameter.grad = None


@contextmanager
def tuned(tunings: Sequence[Tuning], anew: bool = False) -> Iterator[None]:
    """Let linears compute with the values under training; `anew`: each call decodes its weight."""
    with ExitStack() as stack:
        for tuning in tunings:
            stack.enter_context(standing_in(tuning.linear, tuning.forward_anew if anew else tuning.forward))
        yield


def _rms(tensor: Tensor) -> float:
    """Root mean square of a tensor; 1 for zeros."""
    return float(tensor.detach().float().square().mean().sqrt()) or 1.0
