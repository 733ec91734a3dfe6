"""The linears of a model: their weights, selection by patterns of names, and groups of linears that share an input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.nn import hooked
from harness.utils.errors import Refusal


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear that methods can quantize."""
    return isinstance(module, nn.Linear | Conv1D)


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    """The linears inside a module such as a block, in module order, by their names relative to that module."""
    return {name: submodule for name, submodule in module.named_modules() if is_linear(submodule)}


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear as (N out, K in); a transposed view for Conv1D."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(module, Conv1D) else weight


def is_transposed(module: nn.Module) -> bool:
    """Whether a module stores its weights as (K, N): Conv1D, and experts in one tensor (E, K, N)."""
    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))


def experts_of(module: nn.Module, key: str) -> Tensor | None:
    """The parameter `key` of a module as (E N, K), one expert behind another; None if it is no tensor of experts."""
    parameter = module._parameters.get(key)
    if parameter is None or parameter.dim() != 3:
        return None
    return (parameter.mT if is_transposed(module) else parameter).flatten(0, 1)


def split_skipped(
    names: list[str], patterns: tuple[str, ...], floats: Iterable[str] = ()
) -> tuple[list[str], list[str]]:
    """The names that match no pattern, and the names that match one (shell patterns, case-sensitive).

    A pattern may also match only names of `floats`, which stay float without it.
    Raises: ValueError if a pattern matches nothing, or every name matches one.
    """
    matched = matching([*floats, *names], patterns, "skip")
    skipped = [name for name in names if name in matched]
    quantized = [name for name in names if name not in skipped]
    if not quantized:
        raise ValueError(f"skip={list(patterns)} matches all {len(names)} linears; use method=none for the float model")
    return quantized, skipped


def matching(names: list[str], patterns: tuple[str, ...], key: str) -> list[str]:
    """The names that match a pattern (shell patterns, case-sensitive); `key` is the config key of the patterns.

    Raises: Refusal if a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise Refusal(f"{key}={pattern} matches no linear; expected a pattern for names such as {names[-1]}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def input_groups(modules: dict[str, nn.Module], run: Callable[[], object]) -> list[list[str]]:
    """Names of modules, grouped by the tensor objects that they read, in the order in which `run` executes them.

    The modules of a group read the same tensors, with the same values, in all their calls (torch counts changes in
    place): one that is called again with another tensor belongs to no group of modules that are called once. Each
    module that did not run (an expert that received no token) is a separate group at the end.
    """
    inputs: dict[str, list[tuple[Tensor, int]]] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: inputs.setdefault(name, []).append((args[0], args[0]._version))

    with hooked(module.register_forward_pre_hook(recorder(name)) for name, module in modules.items()):
        run()
    groups: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for name, calls in inputs.items():  # `inputs` keeps every tensor alive, so no two have the same id
        groups.setdefault(tuple((id(tensor), version) for tensor, version in calls), []).append(name)
    return [*groups.values(), *([name] for name in modules if name not in inputs)]
