"""Tensors that are computed once and do not depend on any weight: tables of a codebook, factors of a transform."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
_MAX_RESULTS = 64  # of one function


def constant(function: Callable[P, T]) -> Callable[P, T]:
    """Compute the result for each set of arguments once; code that torch.compile makes contains the result itself.

    Later callers may train, so the result is an ordinary tensor even if the first call is made in inference mode.
    """
    cached = functools.lru_cache(maxsize=_MAX_RESULTS)(torch.inference_mode(False)(function))

    @functools.wraps(function)
    def call(*args: Hashable) -> T:
        return cached(*args)

    marked: Callable[P, T] = torch.compiler.assume_constant_result(call)
    return marked
