"""Hashes of bytes, files, tensors and modules. Records and caches use them to identify contents."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import torch
from torch import Tensor, nn


def sha256(data: bytes) -> str:
    """The SHA-256 of `data`, in hexadecimal digits; records identify texts and tokens by it."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(file: Path) -> str:
    """The SHA-256 of the content of a file, which is read piece by piece."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(*parts: str) -> str:
    """One hash of several strings."""
    return sha256("\n".join(parts).encode())


def tensor_digest(*tensors: Tensor) -> str:
    """One hash of the shapes, dtypes and contents of tensors."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def module_digest(module: nn.Module) -> str:
    """Hash of a module: its printed structure, and every parameter and buffer."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return digest(repr(module), *(name for name, _ in named), tensor_digest(*(tensor for _, tensor in named)))


def machine() -> tuple[str, ...]:
    """What floating-point results depend on in this process: library versions, number of threads, instruction set."""
    versions = (torch.__version__, importlib.metadata.version("transformers"))
    return (*versions, str(torch.get_num_threads()), torch.backends.cpu.get_cpu_capability())
