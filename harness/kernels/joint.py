"""Linears that read the same input, computed together: of one token, the first that is called computes them all.

At one token a step, a product of a small weight takes about as long as the call and the start of a second thread. A
block calls its query, key and value, and its gate and up, one after another with the same input, so one call is enough.
Engines merge these weights when they load a model that they know. Here the input groups were seen in a forward, the
modules stay as they are, and each takes its part of the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.kernels.base import JoinableKernel, Kernel


class Joint:
    """One kernel for several linears; it keeps the outputs of one token until each linear has taken its part.

    Not for calls from several threads at once. It is no module, because a module's attributes are slow to set.
    """

    def __init__(self, kernel: Kernel, bias: Tensor | None, rows: Sequence[int]) -> None:
        """`bias` is (N,), of all linears; `rows` of each."""
        self._forward, self._bias, self._rows = kernel.forward, bias, list(rows)
        self._inputs: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def take(self, index: int, inputs: Tensor) -> Tensor:
        """The outputs of linear `index` for one token (..., K), which is the same object for all linears."""
        if inputs is not self._inputs or index not in self._parts:
            self._inputs = inputs
            self._parts = dict(enumerate(self._forward(inputs, self._bias).split_with_sizes(self._rows, -1)))
        part = self._parts.pop(index)
        if not self._parts:
            self._inputs = None
        return part


class JoinedLinear(Kernel):
    """The kernel of one linear of a `Joint`; it computes more than one token by itself."""

    def __init__(self, own: Kernel, joint: Joint, index: int) -> None:
        super().__init__(own.shape)
        self.name, self.quantizes_inputs = own.name, own.quantizes_inputs
        self.own, self._joint, self._index = own, joint, index

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        if inputs.numel() == self.shape[1]:
            return self._joint.take(self._index, inputs)
        outputs: Tensor = self.own(inputs, bias)
        return outputs


def join(kernels: Sequence[JoinableKernel], biases: Sequence[Tensor | None]) -> list[JoinedLinear] | None:
    """Kernels that compute one token together; None if the weights cannot be stored as one. `biases` are (N,)."""
    present = [bias for bias in biases if bias is not None]
    if len(kernels) < 2 or 0 < len(present) < len(biases):
        return None
    kernel = type(kernels[0]).joined(kernels)
    if kernel is None:
        return None
    joint = Joint(kernel, torch.cat(present) if present else None, [own.shape[0] for own in kernels])
    return [JoinedLinear(own, joint, i) for i, own in enumerate(kernels)]
