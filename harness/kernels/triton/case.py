"""One compiled variant of a kernel, for the tests and the resource table."""

from __future__ import annotations

from dataclasses import dataclass

from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Case:
    """A variant; `signature` maps each argument to its triton type, or to "constexpr" if `constexprs` has its value."""

    name: str
    kernel: JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
