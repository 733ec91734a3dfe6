"""Training of the floats of quantized weights while their codes stay: what blocks and whole models share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.core import QTensor
from harness.core.formats import Tuner
from harness.nn import QuantLinear, standing_in
from harness.quantization.blocks import straight_through

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


class Steps:
    """Adam with a learning rate that falls to zero along half a cosine, over `count` steps.

    `lr` is a share of the root mean square of each tensor.
    """

    def __init__(self, tensors: Sequence[Tensor], lr: float, count: int) -> None:
        groups = [{"params": [tensor], "lr": lr * _rms(tensor)} for tensor in tensors]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, count)

    def take(self, differentiate: Callable[[], object]) -> None:
        """One step by the gradients that `differentiate` adds."""
        with torch.enable_grad():
            self.optimizer.zero_grad()
            differentiate()
        self.optimizer.step()
        self.schedule.step()


def split(count: int) -> tuple[list[int], list[int]]:
    """Indices of the sequences that train, and of those that are held out; none if there is only one."""
    held_out = [i for i in range(count) if count > 1 and i % _HELD_OUT == _HELD_OUT - 1]
    return [i for i in range(count) if i not in held_out], held_out


def tunings_of(module: nn.Module) -> Iterator[Tuning]:
    """The quantized linears in a module whose floats can be trained."""
    for each in module.modules():
        if isinstance(each, QuantLinear) and isinstance(each.packed, QTensor):
            tuner = each.packed.tuner()
            if tuner is not None:
                yield Tuning(each, tuner)


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
