"""The calls that a model makes of its blocks: noted in a forward, compared, and cast to another dtype."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from harness.nn import hooked

INSTEAD = "it cannot be calibrated block by block, use a data-free method such as rtn"


class Enough(Exception):  # noqa: N818 - not an error: every watched module has been called
    """Ends a forward early."""


@torch.no_grad()
def calls_of(run: Callable[[], object], modules: list[nn.Module], keep: Callable[..., Any]) -> list[Any]:
    """`keep(args, options)` of each call of `modules` during `run`, in order; as many calls as modules end the run."""
    calls: list[Any] = []

    def note(_module: nn.Module, args: Any, options: Any) -> None:
        calls.append(keep(args, options))
        if len(calls) == len(modules):
            raise Enough

    with hooked(module.register_forward_pre_hook(note, with_kwargs=True) for module in modules), suppress(Enough):
        run()
    return calls


def split(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, Any]:
    """The hidden states (1, T, D) of a call of a block, and its other arguments.

    Raises: ValueError if the call has no hidden states.
    """
    states = args[0] if args else options.get("hidden_states")
    if not isinstance(states, Tensor):
        raise ValueError(f"blocks receive no hidden states as first argument or as hidden_states; {INSTEAD}")
    return states, without_states(args, options)


def without_states(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    """The arguments of a call of a block other than its hidden states, which are the first or `hidden_states`."""
    return args[1:], {key: value for key, value in options.items() if args or key != "hidden_states"}


def equal(left: Any, right: Any) -> bool:
    """Whether two nests of arguments are equal, tensor by tensor."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(value, right[key]) for key, value in left.items())
    return bool(left is right or left == right)


def cast(nest: Any, dtype: torch.dtype) -> Any:
    """Float tensors of a nest of arguments in `dtype`."""
    if isinstance(nest, Tensor):
        return nest.to(dtype) if nest.is_floating_point() else nest
    if isinstance(nest, tuple | list):
        return type(nest)(cast(item, dtype) for item in nest)
    if isinstance(nest, dict):
        return {key: cast(value, dtype) for key, value in nest.items()}
    return nest
