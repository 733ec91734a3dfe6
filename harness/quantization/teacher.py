"""The float model as the teacher of a quantized one: the mean over tokens of KL(float || quantized)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.calibration import Stream, Tail, after_blocks
from harness.models import Decoder


@dataclass(frozen=True)
class Teacher:
    """The last states (1, T, D) of the float model for each sequence, and its tail from states to logits."""

    states: Sequence[Tensor]
    tail: Tail

    def kl(self, states: Tensor, chosen: Sequence[int], slope: bool = True) -> tuple[float, Tensor]:
        """Mean KL per token of the logits for last states (B, T, D) of a quantized model, on the sequences `chosen`.

        Returns: the KL, and its gradient with respect to the states; zeros without `slope`.
        """
        count = states.shape[0] * states.shape[1]

        def kl(i: int, logits: Tensor, tokens: slice) -> Tensor:
            with torch.no_grad():
                wanted = F.log_softmax(self.tail(self.states[i][0, tokens]).float(), -1)
            return F.kl_div(F.log_softmax(logits, -1), wanted, reduction="sum", log_target=True) / count

        parts = [self.tail.loss(row, partial(kl, i), slope) for row, i in zip(states, chosen, strict=True)]
        return sum(loss for loss, _ in parts), torch.stack([gradient for _, gradient in parts])


@torch.no_grad()
def teacher_of(decoder: Decoder, tokens: Tensor) -> Teacher:
    """The float model in its present state; what follows its last block must not change afterwards."""
    stream = Stream(decoder, tokens)
    return Teacher([stream.onward(states) for states in stream.states], after_blocks(decoder, tokens))
