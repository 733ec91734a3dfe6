"""Gradients through all blocks in the memory of one: forward keeps their inputs, backward runs each block again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.calibration.replay import Stream

Head = Callable[[Tensor], tuple[float, Tensor]]


def backward(stream: Stream, states: Tensor, head: Head) -> tuple[float, Tensor]:
    """Add the gradients of a loss to the leaves with which the blocks compute.

    `states` (B, T, D) enter the first block; `head` returns the loss for the last states, and its gradient with respect
    to them, both in the shape of `states`. Only the inputs of the blocks and the graph of one block are in memory.
    Returns: the loss, and its gradient with respect to `states`.
    """
    inputs = []
    with torch.no_grad():
        for position in range(len(stream.blocks)):
            inputs.append(states)
            states = stream.run_to_train(states, position)
    loss, gradient = head(states)
    for position in reversed(range(len(stream.blocks))):
        entering = inputs.pop().detach().requires_grad_()
        with torch.enable_grad():
            outputs = stream.run_to_train(entering, position)
        torch.autograd.backward(outputs, gradient.to(outputs.dtype))
        assert entering.grad is not None
        gradient = entering.grad
    return loss, gradient
