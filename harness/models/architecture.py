"""The model's shape, discovered: decoder blocks, their linears, and which of them read the same input."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.nn.hooks import hooked


def block_prefix(model: nn.Module) -> str:
    """Name of the list of decoder blocks: the module list with most parameters, its items of one class.

    Raises: ValueError if the model has none.
    """
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(item) for item in module}) == 1
    }
    if not sizes:
        raise ValueError(f"model of class {type(model).__name__} has no list of equal blocks; expected a decoder")
    largest: str = max(sizes, key=sizes.__getitem__)
    return largest


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """All linears inside decoder blocks by full name, in module order; embedding, head and norms are outside."""
    prefix = block_prefix(model) + "."
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear | Conv1D)
    }


def linears_of(block: nn.Module) -> dict[str, nn.Module]:
    """The linears of one block by name within it, in module order."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def split_skipped(names: list[str], patterns: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Names that no pattern matches, and names that one does (shell patterns, case matters).

    Raises: ValueError if a pattern matches nothing, or nothing is left.
    """
    skipped = matching(names, patterns, "skip")
    kept = [name for name in names if name not in skipped]
    if not kept:
        raise ValueError(f"skip={list(patterns)} matches all {len(names)} linears; use method=none for the float model")
    return kept, skipped


def matching(names: list[str], patterns: tuple[str, ...], key: str) -> list[str]:
    """Names that a pattern matches (shell patterns, case matters); `key` is where the patterns are configured.

    Raises: ValueError if a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{key}={pattern} matches no linear; expected a pattern for names such as {names[-1]}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def uncovered(model: nn.Module) -> list[str]:
    """Matrices inside decoder blocks that are no linear's (fused experts, say), so that no method sees them."""
    known = {id(parameter) for module in linears(model).values() for parameter in module.parameters()}
    prefix = block_prefix(model) + "."
    return [
        name
        for name, parameter in model.named_parameters()
        if name.startswith(prefix) and parameter.dim() >= 2 and id(parameter) not in known
    ]


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear as (N out, K in); a transposed view for Conv1D."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(module, Conv1D) else weight


def input_groups(modules: dict[str, nn.Module], run: Callable[[], object]) -> list[list[str]]:
    """Names of modules that read the very same tensor, grouped in execution order, as seen while `run` runs them.

    A linear that did not run (an expert that no token chose) is a group of its own, at the end.
    """
    seen: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: seen.append((name, args[0]))

    with hooked(module.register_forward_pre_hook(note(name)) for name, module in modules.items()):
        run()
    grouped: dict[int, list[str]] = {}
    for name, inputs in seen:  # `seen` keeps every input alive, so that no two share an id
        members = grouped.setdefault(id(inputs), [])
        members += [name] if name not in members else []
    ran = {name for members in grouped.values() for name in members}
    return [*grouped.values(), *([name] for name in modules if name not in ran)]
