"""The float model beside the quantized one: the inputs of the same linears for the same tokens, at the same block."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor, nn

from harness.calibration.replay import Stream, Watched


class Reference:
    """A stream of the float model at the block that is being quantized.

    targets  the output states of the block in the float model, for each sequence
    """

    def __init__(self, stream: Stream) -> None:
        """`stream` has the float model's states, at the block, whose linears are still those of the float model."""
        self._stream = stream
        self.targets = stream.outputs({}, keep=True)
        self._twins: dict[nn.Module, nn.Module] = {}
        self._inputs: dict[nn.Module, Watched] = {}

    @property
    def states(self) -> list[Tensor]:
        """The input states of the block in the float model."""
        return self._stream.states

    def hold(self) -> None:
        """Keep a copy of the block, because its linears are about to be quantized."""
        block = self._stream.blocks[self._stream.position]
        self._block = copy.deepcopy(block)
        self._twins = dict(zip(block.modules(), self._block.modules(), strict=True))

    def read(self, index: int, linears: Iterable[nn.Module]) -> None:
        """Run the float block on one sequence, for `next_input` of these linears of the block."""
        self._inputs = self._stream.watch(index, self._block, {linear: self._twins[linear] for linear in linears})

    def next_input(self, linear: nn.Module) -> Tensor:
        """The float model's input of the next call of a linear in the sequence that was read."""
        return self._inputs[linear].popleft()

    def advance(self) -> None:
        """Move the stream to the next block."""
        self._stream.advance(self.targets)
