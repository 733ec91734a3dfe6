"""The model's shape, discovered: decoder blocks, their linears, and which of them read the same input."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.core.method import InputGroup


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


def split_skipped(names: list[str], patterns: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Names that no pattern matches, and names that one does (shell patterns, case matters).

    Raises: ValueError if a pattern matches nothing, or nothing is left.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"skip={pattern} matches no linear; expected a pattern for names such as {names[-1]}")
    skipped = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    kept = [name for name in names if name not in skipped]
    if not kept:
        raise ValueError(f"skip={list(patterns)} matches all {len(names)} linears; use method=none for the float model")
    return kept, skipped


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


def input_groups(model: nn.Module, names: list[str], tokens: Tensor) -> list[InputGroup]:
    """Linears that read the very same tensor, grouped in execution order, as seen on `tokens` (B, T).

    A linear that did not run (an expert that no token chose) is a group of its own, at the end.
    """
    seen: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[[Tensor], None]:
        return lambda inputs: seen.append((name, inputs))

    run_with_inputs(model, {name: note(name) for name in names}, tokens)
    grouped: dict[int, dict[str, nn.Module]] = {}
    for name, inputs in seen:  # `seen` keeps every input alive, so that no two share an id
        grouped.setdefault(id(inputs), {}).setdefault(name, model.get_submodule(name))
    ran = {name for members in grouped.values() for name in members}
    idle = [InputGroup({name: model.get_submodule(name)}) for name in names if name not in ran]
    return [InputGroup(members) for members in grouped.values()] + idle


@torch.inference_mode()
def run_with_inputs(model: nn.Module, watchers: dict[str, Callable[[Tensor], None]], tokens: Tensor) -> None:
    """Run `model` on `tokens` (B, T) and show each named linear's input (B, T, K) to its watcher."""
    device = next(model.parameters()).device
    handles = [model.get_submodule(name).register_forward_pre_hook(_shown(watch)) for name, watch in watchers.items()]
    try:
        model(input_ids=tokens.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _shown(watch: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _module, args: watch(args[0])
