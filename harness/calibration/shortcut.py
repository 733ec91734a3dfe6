"""Modules whose output is that of their last linear: once that linear's inputs are known, the rest need not run again.

In a block that is quantized group after group, all before a linear is final when the linear is observed. Its
inputs are kept, and its module (attention, mlp) answers later passes over the block with the linear alone.
Every linear then runs about once a block, at the price of one linear's inputs in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from harness.models import linears_of
from harness.nn.hooks import first_of, hooked, standing_in


@dataclass
class Shortcut:
    """`module`, whose output is that of its linear called `last`; `as_tuple` is how many items it returns, the others
    being None (0: the tensor itself)."""

    module: nn.Module
    last: str
    as_tuple: int
    inputs: list[Tensor] = field(default_factory=list)

    @property
    def linear(self) -> nn.Module:
        """The linear as it is now, float or quantized."""
        return self.module.get_submodule(self.last)

    @contextmanager
    def taken(self, index: int) -> Iterator[None]:
        """Let the module answer for sequence `index` from kept inputs."""

        def forward(*_args: Any, **_options: Any) -> Any:
            output = self.linear(self.inputs[index])
            return (output, *[None] * (self.as_tuple - 1)) if self.as_tuple else output

        with standing_in(self.module, forward):
            yield


def shortcuts(block: nn.Module, run: Callable[[], object]) -> list[Shortcut]:
    """The shortcuts in a block, as seen while `run` runs it: the outermost module of each, never the block itself."""
    made: list[tuple[str, Any]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: made.append((name, output))

    with hooked(module.register_forward_hook(note(name)) for name, module in block.named_modules() if name):
        run()
    found: dict[str, Shortcut] = {}
    outputs = {name: output for name, output in made if isinstance(output, Tensor)}
    for last in linears_of(block):
        for name, output in made:  # inner modules end before outer ones, so the outermost is found last
            if not last.startswith(f"{name}.") or first_of(output) is not outputs.get(last):
                continue
            size = len(output) if isinstance(output, tuple) else 0
            if size == 0 or all(item is None for item in output[1:]):
                found[last] = Shortcut(block.get_submodule(name), last.removeprefix(f"{name}."), size)
    return list(found.values())
