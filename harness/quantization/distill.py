"""Trains a quantized model end to end, to reproduce the float model's distribution of the next token.

Scales, float zero points and codebooks move, the values of the QTensors' tuners, and the norms of the blocks. Codes
stay, or are those of weights that are trained too (quantization-aware training). Some sequences are held out: of the
states after each epoch and before training, the one with the lowest loss on them is kept. Memory: the inputs of all
blocks for one batch, and one block's graph; five times all that is trained.

Source: EfficientQAT, Chen et al. 2024, arXiv 2407.11062, section 3.3: step sizes are trained end to end; the loss is
that of mlx-lm's DWQ, in one direction and without its hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.calibration import Stream, backward
from harness.core import Distillation
from harness.core.precision import products
from harness.models import Decoder
from harness.quantization.teacher import Teacher
from harness.quantization.tuning import Adam, Floats, Steps, Tuned, train, tuned, tunings_of, vectors_of
from harness.utils.progress import Track, silent


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
    Returns: the loss before and after training; None if there is nothing that can be trained.
    """
    tunings = [tuning for block in decoder.blocks for tuning in tunings_of(block, weights)]
    with vectors_of(decoder.blocks) as floats, tuned(tunings, anew=True):
        if not tunings and not floats:
            return None
        task = _Task(tunings, floats, Stream(decoder, tokens), teacher, options.bfloat16)
        return train(task, len(tokens), options, track)


@dataclass
class _Task(Floats):
    """The mean KL per token from the teacher to a model."""

    stream: Stream
    teacher: Teacher
    bfloat16: bool

    def steps(self, lr: float, count: int) -> Steps:
        return Adam(self.tensors, lr, count, fused=True)

    def differentiate(self, chosen: Sequence[int]) -> None:
        batch = torch.cat([self.stream.states[i] for i in chosen])
        with products(batch.device, self.bfloat16):
            backward(self.stream, batch, lambda states: self.teacher.kl(states, chosen))

    @torch.no_grad()
    def error(self, chosen: Sequence[int]) -> float:
        with products(self.stream.states[0].device, self.bfloat16):
            losses = [self.teacher.kl(self.stream.onward(self.stream.states[i]), [i], False)[0] for i in chosen]
        return sum(losses) / len(losses)
