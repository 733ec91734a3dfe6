"""Modules whose output is the output of their last linear: later passes reuse its inputs and run this linear alone.

A block is quantized group by group, so everything before a linear is final when the linear is observed. Its inputs
are stored. The linear itself is final in the next pass over the block: its module (attention, mlp) then runs only this
linear, once, and in later passes nothing. The cost is to hold one linear's inputs or outputs in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from harness.models import linears_of
from harness.nn import first_of, hooked, standing_in


@dataclass
class Shortcut:
    """A `module` that returns the output of its linear `last`.

    others   the Nones that the module returns after the output, in a tuple or list; None if it returns the tensor alone
    inputs   the inputs of the linear, one tensor per sequence; empty until they are observed
    outputs  the outputs of the final linear, by sequence; the sequence's input is dropped
    """

    module: nn.Module
    last: str
    others: tuple[None, ...] | list[None] | None
    inputs: list[Tensor | None] = field(default_factory=list)
    outputs: dict[int, Tensor] = field(default_factory=dict)

    @property
    def linear(self) -> nn.Module:
        """The linear in its present state, float or quantized."""
        return self.module.get_submodule(self.last)

    @contextmanager
    def taken(self, index: int) -> Iterator[None]:
        """Let the module return its output for sequence `index`, from what is stored; the linear must be final."""

        def forward(*_args: Any, **_options: Any) -> Any:
            if index not in self.outputs:
                self.outputs[index], self.inputs[index] = self.linear(self.inputs[index]), None
            output: Any = self.outputs[index].clone()  # a block may add to it in place
            return output if self.others is None else type(self.others)([output, *self.others])

        with standing_in(self.module, forward):
            yield


def shortcuts(block: nn.Module, run: Callable[[], object]) -> list[Shortcut]:
    """The shortcuts of a block, discovered while `run` runs it: the outermost module of each, but never the block."""
    calls: list[tuple[str, Any]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: calls.append((name, output))

    with hooked(module.register_forward_hook(note(name)) for name, module in block.named_modules() if name):
        run()
    by_linear: dict[str, Shortcut] = {}
    outputs = {name: output for name, output in calls if isinstance(output, Tensor)}
    for last in linears_of(block):
        for name, output in calls:  # inner modules end before outer ones, so the outermost comes last and stays
            if not last.startswith(f"{name}.") or first_of(output) is not outputs.get(last):
                continue
            others = output[1:] if isinstance(output, tuple | list) else None
            if others is None or all(item is None for item in others):
                by_linear[last] = Shortcut(block.get_submodule(name), last.removeprefix(f"{name}."), others)
    return list(by_linear.values())
