"""Statistics kept on disk between runs: bounded in size, least recently used first out, safe for many processes.

An entry's name is a hash of all that decides it: the tokens, the model, the weights of every block up to its own,
the statistic's source and what its arithmetic runs on. So an entry never goes stale, it is only forgotten.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.core.stats import Stat

_SUFFIX = ".safetensors"


class StatCache:
    """A folder of entries that together take at most `limit` bytes; a limit of 0 keeps nothing."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def has(self, key: str) -> bool:
        return self.limit > 0 and self._path(key).exists()

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of an entry, None if it is not there or cannot be read."""
        path = self._path(key)
        try:
            found = load_file(path)
            os.utime(path)  # used now: the last to be dropped
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError):  # half a disk's worth of it: forget it, it is computed again
            path.unlink(missing_ok=True)
            return None
        return found

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep an entry, whole or not at all; one that is too large, or a full disk, leaves all as it was."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.limit == 0 or size > self.limit:
            return
        with suppress(OSError, SafetensorError):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=self.folder)
            os.close(handle)
            try:
                save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, name)
                with FileLock(self.folder / ".lock"):
                    self._make_room(size)
                    Path(name).replace(self._path(key))
            finally:
                Path(name).unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        entries = [(path, path.stat()) for path in self.folder.glob(f"*{_SUFFIX}")]
        taken = size + sum(stat.st_size for _, stat in entries)
        for path, stat in sorted(entries, key=lambda entry: entry[1].st_mtime):
            if taken <= self.limit:
                return
            path.unlink(missing_ok=True)
            taken -= stat.st_size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"


def digest(*parts: str) -> str:
    """One hash of several."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def tensor_digest(*tensors: Tensor) -> str:
    """Hash of the shapes, types and contents of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def module_digest(module: nn.Module) -> str:
    """Hash of a module: its structure as printed, and every parameter and buffer."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return digest(repr(module), *(name for name, _ in named), tensor_digest(*(tensor for _, tensor in named)))


@functools.cache
def stat_identity(cls: type[Stat]) -> str:
    """What decides a statistic beside its inputs: its source and what the arithmetic runs on."""
    source = inspect.getsource(inspect.getmodule(cls) or cls)
    return digest(cls.__qualname__, source, *machine())


def machine() -> tuple[str, ...]:
    """What arithmetic runs on: versions, threads, instruction set."""
    versions = (torch.__version__, importlib.metadata.version("transformers"))
    return (*versions, str(torch.get_num_threads()), torch.backends.cpu.get_cpu_capability())
