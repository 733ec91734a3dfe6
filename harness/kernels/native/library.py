"""The native library: torch operators in C++, which setup.py builds where a compiler is.

Where it was not built, or was built for another torch, `available` is false and the kernels of torch run instead; the
record of a run names its kernels and says why there is no library.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)  # of inputs, for all kernels
_FILE = "_native.so"
_SOURCES = "_native.sources"  # digest of the sources that it was built from, written by setup.py


def available() -> bool:
    """Whether the operators `torch.ops.ptqbench_native` can be called."""
    return problem() is None


def runs(dtype: torch.dtype) -> bool:
    """Whether the operators can be called with inputs of `dtype`."""
    return dtype in DTYPES and available()


def fault() -> str | None:
    """Why the library that is here cannot be used, in one line; None also where none was built, which is no fault."""
    return problem() if _file().exists() else None


@functools.cache
def problem() -> str | None:
    """Load the library, once per process. Returns: why it cannot be used, in one line, or None."""
    file = _file()
    if not file.exists():
        return "not built; run make setup where a C++17 compiler is installed"
    built_from = file.with_name(_SOURCES)
    if not built_from.exists() or built_from.read_text() != sources_digest():
        return "built from other sources; run make setup again"
    try:
        torch.ops.load_library(str(file))
    except OSError as reason:
        return f"built for another torch ({str(reason).splitlines()[0][:100]}); run make setup again"
    _register_fakes()
    return None


def _file() -> Path:
    return Path(__file__).with_name(_FILE)


def sources_digest() -> str:
    """A digest of the C++ sources: with a library of others, the `code` of a record would not be what ran."""
    files = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def set_level(name: str) -> str:
    """Use the processor features of this level at most ("" is all): plain, avx2, avx512, avx512_vnni, avx512_bf16,
    amx.

    Returns: the level that runs, the best one if the processor lacks the features.
    """
    level: str = torch.ops.ptqbench_native.set_level(name)
    return level


def description() -> str:
    """The level of processor features that runs, or why the library cannot be used; for the record of a run."""
    return problem() or str(torch.ops.ptqbench_native.level())


def _register_fakes() -> None:
    def linear(x: Tensor, *arguments: Any) -> Tensor:
        *_, rows = arguments
        return x.new_empty(*x.shape[:-1], rows)

    def incoherent_linear(x: Tensor, *arguments: Any) -> Tensor:
        left = arguments[4]
        return x.new_empty(*x.shape[:-1], len(left))

    def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty(*x.shape[:-1], len(weight))

    torch.library.register_fake("ptqbench_native::dense_linear", dense_linear)
    torch.library.register_fake("ptqbench_native::incoherent_linear", incoherent_linear)
    for name in ("grouped_linear", "int8_linear", "additive_linear"):
        torch.library.register_fake(f"ptqbench_native::{name}", linear)
