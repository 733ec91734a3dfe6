"""What a kernel module gives to be compiled and looked at, on a machine that need not have a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One kernel at the types and constants that some shape runs it with.

    name         short, unique within its module
    kernel       the function that triton.jit returned
    signature    type of each argument as triton writes it: "*bf16", "i32", "constexpr"
    constexprs   value of each argument whose type is "constexpr"
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
