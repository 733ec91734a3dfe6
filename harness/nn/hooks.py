"""Context managers for hooks and replaced forwards, and the tensors in arguments and outputs of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks of `handles` on exit, also after an error."""
    attached = list(handles)
    try:
        yield
    finally:
        for handle in attached:
            handle.remove()


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of a module until exit, also a forward that was set on the instance (as accelerate does)."""
    previous = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's forward is visible again
        if previous is not None:
            module.forward = previous


def first_of(output: Any) -> Any:
    """The hidden states among the outputs of a module: the output itself, or the first item of a tuple or list."""
    return output[0] if isinstance(output, tuple | list) else output


def tensors_of(arguments: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts of arguments."""
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, tuple | list):
        for item in arguments:
            yield from tensors_of(item)
    elif isinstance(arguments, dict):
        for item in arguments.values():
            yield from tensors_of(item)
