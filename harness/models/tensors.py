"""The tensors of a checkpoint's weight files, read one at a time; nothing is executed that a file contains."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from harness.models import checkpoint
from harness.models.checkpoint import DOWNLOAD, CheckpointError, Stored


@dataclass(frozen=True)
class TensorFiles:
    """The weight files of a folder; `stored` and `metadata` read headers alone.

    Raises, in every member: CheckpointError if a file is missing, damaged or no checkpoint.
    """

    folder: Path

    @cached_property
    def stored(self) -> Mapping[str, Stored]:
        """Dtype and shape of each tensor, by name."""
        return checkpoint.tensors(self.folder)

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """The texts in the headers of all safetensors files."""
        texts: dict[str, str] = {}
        for file in checkpoint.weight_files(self.folder):
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    texts |= opened.metadata() or {}
        return texts

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype in which it is stored."""
        self.require(name)
        tensor: Tensor = self._sources[name].get_tensor(name)
        return tensor

    def require(self, name: str) -> None:
        """Raises: CheckpointError if there is no tensor of this name."""
        if name not in self.stored:
            raise CheckpointError("cannot be read", f"it has no tensor {name}", DOWNLOAD)

    @cached_property
    def _sources(self) -> dict[str, Any]:
        """What reads each tensor, by its name; of a name in several files, the last file counts."""
        sources: dict[str, Any] = {}
        for file in checkpoint.weight_files(self.folder):
            opened = _Pickle(file) if file.suffix != ".safetensors" else _safetensors(file)
            sources |= dict.fromkeys(opened.keys(), opened)
        return sources


def _safetensors(file: Path) -> Any:
    return ExitStack().enter_context(safe_open(file, framework="pt"))


class _Pickle:
    """A file of torch.save, read without running code, and mapped into memory."""

    def __init__(self, file: Path) -> None:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        self._tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]
