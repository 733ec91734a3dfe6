"""Trains a rotation of the residual stream so that a model with rounded inputs predicts what the float model does.

With the stream x -> x Q, readers compute with W Q, writers with Q^T W, the embeddings with E Q, and the inputs of all
linears are rounded by the scheme; weights are not. Q starts as the identity and stays orthogonal: each step is a Cayley
transform, Q <- (I + a/2 A)^-1 (I - a/2 A) Q, with A = G Q^T - Q G^T of the gradient G with momentum. The model must
have been folded (`Residual.fold`), so that its norms commute with Q; what it has been turned by stays.

Paper: Liu et al. 2024, SpinQuant, arXiv 2405.16406, section 3 and algorithm in appendix; Li et al. 2020, arXiv
2002.01113, algorithm 1 (Cayley SGD with momentum).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.calibration import Stream, backward
from harness.core import Residual, Rotation
from harness.core.formats import InputQuantizer
from harness.core.precision import products
from harness.models import Decoder, weight_of
from harness.nn import standing_in
from harness.quantization.blocks import straight_through
from harness.quantization.teacher import Teacher, teacher_of
from harness.quantization.tuning import Steps, Task, Tuned, train
from harness.utils.progress import Track, silent

_MOMENTUM = 0.9


def train_rotation(
    decoder: Decoder,
    residual: Residual,
    tokens: Tensor,
    quantizers: Mapping[str, InputQuantizer],
    options: Rotation,
    track: Track = silent,
) -> Tuned:
    """Turn the stream of a folded model by a trained rotation; `tokens` (B, T) are those of calibration.

    `quantizers` round the inputs of linears, by name; those of others stay float.
    Returns: the loss before and after training. The model stays as it was if training did not help.
    """
    teacher = teacher_of(decoder, tokens)
    Q = torch.eye(residual.width, device=residual.tables[0].weight.device).requires_grad_()
    task = _Task(Q, residual, Stream(decoder, tokens), teacher, options.bfloat16)
    with _turned(decoder, residual, Q, quantizers):
        return train(task, len(tokens), options, track)


@dataclass
class _Task(Task):
    """The mean KL per token from the teacher to the model with rounded inputs, in the stream turned by Q (D, D)."""

    Q: Tensor
    residual: Residual
    stream: Stream
    teacher: Teacher
    bfloat16: bool

    @property
    def tensors(self) -> list[Tensor]:
        return [self.Q]

    def accept(self) -> None:
        Q = orthogonal(self.Q.detach().double())
        self.residual.turn(lambda values: values @ Q)

    def steps(self, lr: float, count: int) -> Steps:
        return Cayley(self.Q, lr, count)

    def differentiate(self, chosen: Sequence[int]) -> None:
        batch, Q = torch.cat([self.stream.states[i] for i in chosen]), self.Q.detach()

        def head(states: Tensor) -> tuple[float, Tensor]:
            loss, slope = self.teacher.kl(states @ Q.T, chosen)
            self._add(torch.einsum("bti,btj->ij", slope.float(), states.float()))  # of states Q^T
            return loss, slope @ Q

        with products(batch.device, self.bfloat16):
            slope = backward(self.stream, batch @ Q, head)[1]
        self._add(torch.einsum("bti,btj->ij", batch.float(), slope.float()))

    @torch.no_grad()
    def error(self, chosen: Sequence[int]) -> float:
        with products(self.Q.device, self.bfloat16):
            states = (self.stream.onward(self.stream.states[i] @ self.Q) @ self.Q.T for i in chosen)
            losses = [self.teacher.kl(each, [i], False)[0] for i, each in zip(chosen, states, strict=True)]
        return sum(losses) / len(losses)

    def _add(self, slope: Tensor) -> None:
        slope = slope.to(self.Q.dtype)
        self.Q.grad = slope if self.Q.grad is None else self.Q.grad + slope


class Cayley(Steps):
    """Gradient descent with momentum on the orthogonal matrices, with a step that falls linearly to zero.

    lr  the largest step; a step is at most 1 / |A|, the length at which a Cayley transform turns by half a radian
    """

    def __init__(self, Q: Tensor, lr: float, count: int) -> None:
        self.Q, self.lr, self.count, self.done = Q, lr, count, 0
        self.momentum = torch.zeros_like(Q)

    def take(self, differentiate: Callable[[], object]) -> None:
        self.Q.grad = None
        with torch.enable_grad():
            differentiate()
        assert self.Q.grad is not None
        with torch.no_grad():
            self.momentum = _MOMENTUM * self.momentum + self.Q.grad
            A = self.momentum @ self.Q.T
            A = A - A.T
            length = min(self.lr, 1 / float(torch.linalg.matrix_norm(A, 2).clamp(min=1e-12)))
            half = length * (1 - self.done / self.count) / 2 * A
            identity = torch.eye(len(A), dtype=A.dtype, device=A.device)
            self.Q.copy_(torch.linalg.solve(identity + half, (identity - half) @ self.Q))
            self.momentum = (A / 2) @ self.Q  # its part along the matrices
        self.done += 1


def orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal matrix that is nearest to `matrix` (D, D), which rounding has moved from one."""
    U, _, Vh = torch.linalg.svd(matrix)
    nearest: Tensor = U @ Vh
    return nearest


@contextmanager
def _turned(
    decoder: Decoder, residual: Residual, Q: Tensor, quantizers: Mapping[str, InputQuantizer]
) -> Iterator[None]:
    """Let the linears of the blocks compute in the stream turned by Q, with rounded inputs."""
    readers = {port.module for port in residual.readers}
    writers = {port.module for port in residual.writers}
    with ExitStack() as stack:
        for name, linear in decoder.linears().items():
            before = Q if linear in readers else None
            after = Q if linear in writers else None
            stack.enter_context(standing_in(linear, _forward(linear, quantizers.get(name), before, after)))
        yield


def _forward(
    linear: nn.Module, quantizer: InputQuantizer | None, before: Tensor | None, after: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """A linear whose inputs were turned by `before` and rounded, and whose outputs are turned by `after`."""

    def forward(inputs: Tensor) -> Tensor:
        weight, bias = weight_of(linear), getattr(linear, "bias", None)
        weight = weight if before is None else weight @ before
        weight = weight if after is None else after.T @ weight
        bias = bias if after is None or bias is None else bias @ after
        return F.linear(straight_through(quantizer, inputs), weight, bias)

    return forward
