"""GGUF files are read once: the package gguf and transformers parse a file's vocabulary anew in each of their calls.

A vocabulary is hundreds of thousands of strings. `once` gives both the same reader for a file as long as it does not
change. Its arrays are plain views of the mapped file, which numpy slices several times as fast as a `memmap`. The table
of tensor names, which transformers asks for once for each module of a model, is built once too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray


class _Reader(gguf.GGUFReader):
    """The package's reader, whose bytes are a plain array."""

    @property  # type: ignore[override]  # a plain attribute there
    def data(self) -> NDArray[np.uint8]:
        """The bytes of the file."""
        return self._bytes

    @data.setter
    def data(self, mapped: NDArray[np.uint8]) -> None:
        self._bytes = mapped.view(np.ndarray)


def opened(path: str | Path) -> Any:
    """The package's reader of a file; the same one until the file changes.

    Raises: what the package raises for a damaged file.
    """
    file = Path(path).resolve()
    stat = file.stat()
    return _opened(file, stat.st_size, stat.st_mtime_ns)


@contextmanager
def once() -> Iterator[None]:
    """Let transformers take readers and tables of names from here."""
    package: Any = gguf
    reader, names = package.GGUFReader, package.get_tensor_name_map
    try:
        package.GGUFReader, package.get_tensor_name_map = opened, functools.cache(names)
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = reader, names


@functools.lru_cache(maxsize=1)
def _opened(file: Path, _size: int, _time: int) -> Any:
    return _Reader(file)
