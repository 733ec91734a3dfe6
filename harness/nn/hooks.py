"""Hooks on modules that are gone afterwards, modules whose forward is replaced for a while, and nests of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks of `handles` at the end, whatever happens inside."""
    attached = list(handles)
    try:
        yield
    finally:
        for handle in attached:
            handle.remove()


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of a module, whether its class's or one that was set on the instance (as accelerate does)."""
    previous = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's forward is visible again
        if previous is not None:
            module.forward = previous


def first_of(output: Any) -> Any:
    """The hidden states among the outputs of a module: the output, or the first item of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def tensors_of(nest: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of arguments."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, tuple | list):
        for item in nest:
            yield from tensors_of(item)
    elif isinstance(nest, dict):
        for item in nest.values():
            yield from tensors_of(item)
