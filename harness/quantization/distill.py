"""Trains the floats of a quantized model end to end, to reproduce the float model's distribution of the next token.

Scales, float zero points and codebooks move: the values of the QTensors' tuners. Codes stay, or are those of weights
that are trained too (quantization-aware training). The loss is the mean over tokens of KL(float || quantized). Some
sequences are held out: of the states after each epoch and before training, the one with the lowest loss on them is
kept. Memory: the inputs of all blocks for one batch, and one block's graph; five times all that is trained.

Source: EfficientQAT, Chen et al. 2024, arXiv 2407.11062, section 3.3: step sizes are trained end to end; the loss is
that of mlx-lm's DWQ, in one direction and without its hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.calibration import Stream, Tail, after_blocks, backward
from harness.core import Distillation
from harness.models import Decoder
from harness.quantization.tuning import Task, Tuned, train, tuned, tunings_of
from harness.utils.progress import Track, silent


@dataclass(frozen=True)
class Teacher:
    """The last states (1, T, D) of the float model for each sequence, and its tail from states to logits."""

    states: Sequence[Tensor]
    tail: Tail


@torch.no_grad()
def teacher_of(decoder: Decoder, tokens: Tensor) -> Teacher:
    """The float model in its present state; what follows its last block must not change afterwards."""
    stream = Stream(decoder, tokens)
    return Teacher([stream.onward(states) for states in stream.states], after_blocks(decoder, tokens))


def distill(
    decoder: Decoder,
    tokens: Tensor,
    teacher: Teacher,
    options: Distillation,
    track: Track = silent,
    weights: Mapping[nn.Module, Tensor] | None = None,
) -> Tuned | None:
    """Train the quantized linears of a model in place; `tokens` (B, T) are those of the teacher.

    `weights` are those of the float model by quantized linear, if weights are trained too.
    Returns: the loss before and after training; None if no linear has floats that can be trained.
    """
    tunings = [tuning for block in decoder.blocks for tuning in tunings_of(block, weights)]
    if not tunings:
        return None
    task = _Task(tunings, Stream(decoder, tokens), teacher, options.bfloat16)
    with tuned(tunings, anew=True):
        return train(task, len(tokens), options, track)


@dataclass
class _Task(Task):
    """The mean KL per token from the teacher to a model."""

    stream: Stream
    teacher: Teacher
    bfloat16: bool

    def differentiate(self, chosen: Sequence[int]) -> float:
        with self._precision():
            return backward(self.stream, self._batch(chosen), lambda states: self._head(states, chosen))

    @torch.no_grad()
    def error(self, chosen: Sequence[int]) -> float:
        with self._precision():
            losses = [self._head(self.stream.onward(self.stream.states[i]), [i], slope=False)[0] for i in chosen]
        return sum(losses) / len(losses)

    def _batch(self, chosen: Sequence[int]) -> Tensor:
        return torch.cat([self.stream.states[i] for i in chosen])

    def _head(self, states: Tensor, chosen: Sequence[int], slope: bool = True) -> tuple[float, Tensor]:
        """Mean KL of the logits for last states (B, T, D), and its gradient in the same shape, if it is asked for."""
        count, exact, tail = states.shape[0] * states.shape[1], self.teacher.states, self.teacher.tail

        def kl(i: int, logits: Tensor, tokens: slice) -> Tensor:
            with torch.no_grad():
                wanted = F.log_softmax(tail(exact[i][0, tokens]).float(), -1)
            return F.kl_div(F.log_softmax(logits, -1), wanted, reduction="sum", log_target=True) / count

        parts = [tail.loss(row, partial(kl, i), slope) for row, i in zip(states, chosen, strict=True)]
        return sum(loss for loss, _ in parts), torch.stack([gradient for _, gradient in parts])

    def _precision(self) -> AbstractContextManager[object]:
        device = self.stream.states[0].device
        return torch.autocast(device.type, torch.bfloat16) if self.bfloat16 else nullcontext()
