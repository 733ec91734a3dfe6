"""Modules whose output is the output of their last linear: later passes reuse its inputs and run this linear alone.

A block is quantized group by group, so everything before a linear is final when the linear is observed. Its inputs
are stored, and in later passes over the block its module (attention, mlp) runs only this linear. Each linear then
runs about once per block, at the cost of holding one linear's inputs in memory.
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

    as_tuple  number of items that the module returns, all None after the first; 0 if it returns the tensor itself
    inputs    the inputs of the linear, one tensor per sequence; empty until they are observed
    """

    module: nn.Module
    last: str
    as_tuple: int
    inputs: list[Tensor] = field(default_factory=list)

    @property
    def linear(self) -> nn.Module:
        """The linear in its present state, float or quantized."""
        return self.module.get_submodule(self.last)

    @contextmanager
    def taken(self, index: int) -> Iterator[None]:
        """Let the module compute its output for sequence `index` from the stored inputs."""

        def forward(*_args: Any, **_options: Any) -> Any:
            output = self.linear(self.inputs[index])
            return (output, *[None] * (self.as_tuple - 1)) if self.as_tuple else output

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
            size = len(output) if isinstance(output, tuple) else 0
            if size == 0 or all(item is None for item in output[1:]):
                by_linear[last] = Shortcut(block.get_submodule(name), last.removeprefix(f"{name}."), size)
    return list(by_linear.values())
