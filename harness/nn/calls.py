"""Calls of models of any class: the options that a forward accepts, its cache, and one line for an error in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from harness.utils.explain import fitted, is_memory, reason

# What a model's code raises if it cannot run; a ValueError has a message for the user already.
_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    RuntimeError,
    TypeError,
)


def accepted(model: nn.Module, **options: Any) -> dict[str, Any]:
    """The keyword arguments among `options` that the model's forward accepts; all, if it accepts any keyword."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return options
    return {name: value for name, value in options.items() if name in parameters}


def cache_of(output: Any) -> Any:
    """The KV cache in a model's output; None if its class has none, as that of a state space model."""
    return getattr(output, "past_key_values", None)


@contextmanager
def one_line_errors(model: nn.Module, setting: str, remedy: str) -> Iterator[None]:
    """Turn an error that is raised in the model's forward into a ValueError of at most 200 characters.

    `setting` is the KEY=VALUE that the message names first, `remedy` what to do; an index that is out of range, and too
    little memory, have remedies of their own.
    """
    try:
        yield
    except _ERRORS as error:
        raise ValueError(_message(model, setting, error, remedy)) from error


def _message(model: nn.Module, setting: str, error: Exception, remedy: str) -> str:
    if isinstance(error, IndexError):
        remedy = "it has fewer positions or token ids, use a smaller data.seq_len"
    elif is_memory(error):
        remedy = "free memory, or use a smaller data.seq_len or data.batch_size"
    return fitted(f"{setting}: the forward of {type(model).__name__} failed (", reason(error), f"); {remedy}")
