"""The tail of a model, from hidden states to logits: final norm, head, scaling, capping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from harness.calibration.proofs import PROBE_TOKENS, SAME_LOGITS, relative_error, within
from harness.calibration.replay import Stream
from harness.models import Decoder, forward, logits
from harness.nn import standing_in

_LOGIT_ELEMENTS = 2**24  # logits that may be in memory at once: 64 MiB of float32


class Tail:
    """A function from states (T, D) to logits (T, V).

    It runs the model's forward, in which each of `modules` returns `output(states)` instead of computing. It has
    gradients with respect to states that require them.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], output: Callable[[Tensor], Any]) -> None:
        self.model, self.modules, self.output = model, modules, output

    def __call__(self, states: Tensor) -> Tensor:
        output = self.output(states[None])
        tokens = torch.zeros(1, len(states), dtype=torch.int64)
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(standing_in(module, lambda *_args, **_options: output))
            return forward(self.model, tokens)[0]

    def loss(self, states: Tensor, of: Callable[[Tensor, slice], Tensor], slope: bool = True) -> tuple[float, Tensor]:
        """The sum of `of(logits, tokens)` over slices of the tokens of states (T, D), with logits in float32.

        Returns: the sum, and its gradient with respect to the states; zeros without `slope`.
        """
        total, gradient = 0.0, torch.zeros_like(states)
        size = max(1, _LOGIT_ELEMENTS // self(states[:1]).shape[-1])
        for start in range(0, len(states), size):
            tokens = slice(start, min(start + size, len(states)))
            part = states[tokens].detach().requires_grad_(slope)
            with torch.set_grad_enabled(slope):
                loss = of(self(part).float(), tokens)
            total += loss.item()
            if slope:
                (gradient[tokens],) = torch.autograd.grad(loss, part)
        return total, gradient


@torch.no_grad()
def after_blocks(decoder: Decoder, tokens: Tensor) -> Tail:
    """The tail of a model after its last block, proved on the first sequence of `tokens` (B, T).

    Raises: ValueError if the tail depends on more than the states that the last block returns.
    """
    model, probe = decoder.model, Stream(decoder, tokens[:1, :PROBE_TOKENS])
    outputs: list[Any] = []
    handle = probe.blocks[-1].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    expected = logits(model, tokens[:1, :PROBE_TOKENS])[0]
    handle.remove()
    others = tuple(outputs[0][1:]) if isinstance(outputs[0], tuple | list) else None
    tail = Tail(model, probe.blocks, lambda states: states if others is None else (states, *others))
    error, limit = relative_error(tail(probe.onward(probe.states[0])[0]), expected), SAME_LOGITS[expected.dtype]
    if not within(error, limit):
        raise ValueError(
            f"the logits of {type(model).__name__} do not depend only on the states of its last block: their relative "
            f"error is {error:.2g}, expected at most {limit:g}; use analysis.sensitivity=off"
        )
    return tail
