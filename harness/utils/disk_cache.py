"""A cache of tensors on disk: limited in size, least recently used entries dropped first, safe with many processes.

The name of an entry is a hash of everything that decides it, so an entry never becomes wrong; it can only be dropped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_dir
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.utils.files import replacing

_SUFFIX = ".safetensors"


def cache_dir() -> Path:
    """The folder of all caches: $PTQBENCH_CACHE, or the platform's cache folder for ptqbench."""
    return Path(os.environ.get("PTQBENCH_CACHE") or user_cache_dir("ptqbench"))


class DiskCache:
    """A folder of entries, which take at most `limit` bytes together; with a limit of 0 nothing is stored."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def has(self, key: str) -> bool:
        """Whether there is an entry `key`."""
        return self.limit > 0 and self._path(key).exists()

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of an entry; None if there is no such entry or it cannot be read."""
        path = self._path(key)
        try:
            tensors = load_file(path)
            os.utime(path)  # most recently used, so it is dropped last
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError):  # a damaged file is dropped, and its content computed again
            path.unlink(missing_ok=True)
            return None
        return tensors

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry, complete or not at all; an entry that is too large, or a full disk, changes nothing."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.limit == 0 or size > self.limit:
            return
        with suppress(OSError, SafetensorError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._path(key)) as part:
                save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, part)
                with FileLock(self.folder / ".lock"):
                    self._make_room(size)

    def _make_room(self, size: int) -> None:
        """Drop the least recently used entries until `size` bytes more fit into the limit."""
        entries = [(path, path.stat()) for path in self.folder.glob(f"*{_SUFFIX}")]
        total = size + sum(stat.st_size for _, stat in entries)
        for path, stat in sorted(entries, key=lambda entry: entry[1].st_mtime):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"
