"""How much each calibration token matters to each linear: squared gradients of the loss at the linear's outputs.

GuidedQuant, Kim et al. 2025, arXiv 2505.07004: H = sum_t s_t x_t x_t^T, where s_t is the mean of (d loss / d y_t)^2
over a group of outputs. Here all outputs of the linears that read one input are one group, and s has the mean 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.calibration.backward import backward
from harness.calibration.replay import Stream
from harness.calibration.tail import Tail, after_blocks
from harness.models import Decoder
from harness.nn import hooked


class Importance:
    """The weight of each token for each linear of a float model, from one streamed backward pass."""

    def __init__(self, decoder: Decoder, tokens: Tensor, names: Sequence[str]) -> None:
        """`tokens` (B, T) are the calibration sequences, `names` those of the linears."""
        linears = {name: decoder.model.get_submodule(name) for name in names}
        stream, tail = Stream(decoder, tokens), after_blocks(decoder, tokens)
        self._squares: dict[str, list[list[Tensor]]] = {name: [] for name in names}
        self._means: dict[tuple[str, ...], Tensor] = {}
        for index, sequence in enumerate(tokens):
            for squares in self._squares.values():
                squares.append([])
            with hooked(self._watching(linears, index)):
                backward(stream, stream.states[index], partial(_loss, tail, sequence))

    @property
    def tensors(self) -> list[Tensor]:
        """All weights, for a digest."""
        return [call for sequences in self._squares.values() for calls in sequences for call in calls]

    def of(self, names: Iterable[str], index: int) -> Iterator[Tensor]:
        """The weights of the tokens of a sequence, for each call of linears that read the same input."""
        group = tuple(names)
        for calls in zip(*(self._squares[name][index] for name in group), strict=True):
            yield torch.stack(calls).mean(0) / self._mean(group)

    def _mean(self, group: tuple[str, ...]) -> Tensor:
        """The mean over all tokens and linears of a group, at least the smallest normal number."""
        if group not in self._means:
            squares = [call for name in group for calls in self._squares[name] for call in calls]
            self._means[group] = torch.cat(squares).mean().clamp(min=torch.finfo(torch.float32).tiny)
        return self._means[group]

    def _watching(self, linears: dict[str, nn.Module], index: int) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for name, module in linears.items():
            calls = self._squares[name][index]

            def watch(_module: nn.Module, _args: object, output: Tensor, calls: list[Tensor] = calls) -> None:
                if output.requires_grad:  # on the way back, where later calls come first
                    output.register_hook(lambda slope: calls.insert(0, slope.float().square().mean(-1).flatten()))

            yield module.register_forward_hook(watch)


def _loss(tail: Tail, tokens: Tensor, states: Tensor) -> tuple[float, Tensor]:
    """Mean cross-entropy of the next tokens for last states (1, T, D), and its gradient."""
    targets, count = tokens[1:].to(states.device), len(tokens) - 1

    def loss(logits: Tensor, part: slice) -> Tensor:
        return F.cross_entropy(logits, targets[part], reduction="sum") / count

    total, gradient = tail.loss(states[0, :-1], loss)
    return total, F.pad(gradient, (0, 0, 0, 1))[None]  # the last token predicts none of the text
