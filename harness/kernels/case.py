"""One compiled variant of a kernel, as the tests and the resource table want it."""

from __future__ import annotations

from dataclasses import dataclass

from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Case:
    """`signature` maps each argument to its triton type, "constexpr" for those that `constexprs` holds."""

    name: str
    kernel: JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
