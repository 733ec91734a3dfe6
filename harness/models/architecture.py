"""Linears and what they read: the weight of a linear, patterns of names, and which linears share an input."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.nn import hooked


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear that methods can quantize."""
    return isinstance(module, nn.Linear | Conv1D)


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    """The linears inside a module, a block for example, by name within it, in module order."""
    return {name: inner for name, inner in module.named_modules() if is_linear(inner)}


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear as (N out, K in); a transposed view for Conv1D."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(module, Conv1D) else weight


def split_skipped(names: list[str], patterns: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Names that no pattern matches, and names that one does (shell patterns, case matters).

    Raises: ValueError if a pattern matches nothing, or every name is matched.
    """
    skipped = matching(names, patterns, "skip")
    quantized = [name for name in names if name not in skipped]
    if not quantized:
        raise ValueError(f"skip={list(patterns)} matches all {len(names)} linears; use method=none for the float model")
    return quantized, skipped


def matching(names: list[str], patterns: tuple[str, ...], key: str) -> list[str]:
    """Names that a pattern matches (shell patterns, case matters); `key` is where the patterns are configured.

    Raises: ValueError if a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{key}={pattern} matches no linear; expected a pattern for names such as {names[-1]}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def input_groups(modules: dict[str, nn.Module], run: Callable[[], object]) -> list[list[str]]:
    """Names of modules that read the very same tensor, grouped in execution order, as observed while `run` runs them.

    A linear that did not run (an expert that no token chose) is a group of its own, at the end.
    """
    calls: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: calls.append((name, args[0]))

    with hooked(module.register_forward_pre_hook(note(name)) for name, module in modules.items()):
        run()
    groups: dict[int, list[str]] = {}
    for name, inputs in calls:  # `calls` keeps every input alive, so that no two share an id
        members = groups.setdefault(id(inputs), [])
        members += [name] if name not in members else []
    ran = {name for members in groups.values() for name in members}
    return [*groups.values(), *([name] for name in modules if name not in ran)]
