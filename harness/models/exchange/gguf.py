"""GGUF files, as llama.cpp writes them: the rows of each linear in their blocks, found by their values.

transformers decodes a file to a float model, and permutes rows for some architectures. The rows of a linear are found
in the file by their decoded values, which proves the result and needs no table of names.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.models.architecture import weight_of
from harness.models.checkpoint import CheckpointError
from harness.models.exchange.gguf_types import READ, Bytes
from harness.models.exchange.reader import FileQTensor, StoredLinear, Tensors, damaged
from harness.models.gguf_reading import opened
from harness.models.loading import decoded_gguf

_FACTORS = "rope_freqs.weight"
_READ_WHOLE = ("gpt-oss",)  # transformers reads how their rotary frequencies are scaled
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class StoredMatrix:
    """A quantized matrix of a file: the name of its type, and its rows in bytes (N, bytes of a row)."""

    name: str
    type: str
    rows: Bytes

    def decoded(self) -> NDArray[np.float32]:
        """The float32 matrix (N, K)."""
        return _decode(self.rows, self.type)


@dataclass(frozen=True)
class GGUF:
    """The quantized matrices of a GGUF file."""

    file: Path
    name = "gguf"

    @cached_property
    def opened(self) -> Any:
        """The file as the package gguf reads it.

        Raises: CheckpointError if it is damaged: the sizes that it names are checked before they are read.
        """
        try:
            return opened(self.file)
        except Exception as error:  # the package raises whatever numpy and struct raise
            reason = f"{type(error).__name__}: {error}"
            raise damaged(f"{self.file.name} is damaged or no GGUF file: {reason}") from error

    @cached_property
    def matrices(self) -> list[StoredMatrix]:
        """All matrices that are no floats.

        Raises: CheckpointError if the file is damaged.
        """
        return [
            StoredMatrix(tensor.name, tensor.tensor_type.name, tensor.data)
            for tensor in self.opened.tensors
            if tensor.tensor_type.name not in _FLOATS and len(tensor.data.shape) == 2
        ]

    def find(self, linears: dict[str, nn.Module]) -> Iterator[tuple[str, StoredLinear]]:
        """Each of the float `linears` whose rows are rows of one matrix, and the linear in the bytes of the file."""
        waiting = dict(linears)
        for matrix in self.matrices:
            if not waiting:
                return
            places = _Places(matrix)
            for name, module in list(waiting.items()):
                rows = places.of(weight_of(module))
                if rows is not None:
                    del waiting[name]
                    yield name, _stored(name, matrix, rows)


def pretrained(gguf: GGUF, config: Any = None) -> Any:
    """The model in the file as transformers decodes it, in float32, without the traces of its quantization.

    `config` is that of the file if it is known; transformers takes seconds to read it.
    Raises: CheckpointError if its rotary frequencies are scaled in a way that is not known.
    """
    model = decoded_gguf(gguf.file, config)
    _scale_frequencies(model, gguf.opened)
    return model


def _scale_frequencies(model: nn.Module, file: Any) -> None:
    """Divide rotary frequencies as the file says (Llama 3.1 and later, linear scaling), which transformers leaves out.

    Raises: CheckpointError if it scales them in another way.
    """
    architecture = file.get_field("general.architecture").contents()
    kind = file.get_field(f"{architecture}.rope.scaling.type")
    factors = [torch.tensor(tensor.data) for tensor in file.tensors if tensor.name == _FACTORS]
    if kind is not None and kind.contents() == "linear":
        factors.append(torch.tensor(file.get_field(f"{architecture}.rope.scaling.factor").contents()))
    elif kind is not None and kind.contents() != "none" and architecture not in _READ_WHOLE:
        detail = f"{architecture}.rope.scaling.type={kind.contents()}, expected linear or none"
        raise CheckpointError("has rotary frequencies without a reader", detail, "use a folder of transformers")
    rotary: list[Any] = [module for module in model.modules() if hasattr(module, "inv_freq")]
    if factors and not rotary:
        raise damaged(f"it scales rotary frequencies that {type(model).__name__} has not")
    for module, factor in itertools.product(rotary, factors):
        module.inv_freq = module.inv_freq / factor


class _Places:
    """Where the rows of a matrix are, by their values."""

    def __init__(self, matrix: StoredMatrix) -> None:
        self._decoded = torch.from_numpy(matrix.decoded())
        self._rows: dict[torch.dtype, dict[bytes, int]] = {}

    def of(self, weight: Tensor) -> list[int] | None:
        """The rows of the matrix whose values are those of `weight` (N, K); None if it has none for one of them."""
        if weight.shape[1] != self._decoded.shape[1] or len(weight) > len(self._decoded):
            return None
        if weight.dtype not in self._rows:
            digests = _digests(self._decoded.to(weight.dtype))
            self._rows[weight.dtype] = {digest: row for row, digest in enumerate(digests)}
        rows = []
        for digest in _digests(weight):
            row = self._rows[weight.dtype].get(digest)
            if row is None:
                return None
            rows.append(row)
        return rows


def _digests(rows: Tensor) -> Iterator[bytes]:
    """A hash of the bytes of each row, one after another."""
    data = rows.detach().cpu().contiguous().view(torch.uint8).numpy()
    for row in data:
        yield hashlib.blake2b(row, digest_size=16).digest()


def _stored(name: str, matrix: StoredMatrix, rows: list[int]) -> StoredLinear:
    """The linear of some rows of a matrix."""
    data = matrix.rows[np.array(rows)]
    read = READ.get(matrix.type)
    if read is not None:
        return StoredLinear(read(name, data), 8 * data.nbytes, label=matrix.type)
    return StoredLinear(_as_file(data, matrix.type), 8 * data.nbytes, label=matrix.type)


def _as_file(data: Bytes, kind: str) -> FileQTensor:
    shape = _decode(data[:1], kind).shape[1]

    def decode(tensors: Tensors) -> Tensor:
        decoded = torch.from_numpy(_decode(tensors["rows"].cpu().numpy(), kind))
        return decoded.to(tensors["rows"].device)

    return FileQTensor((len(data), shape), kind, {"rows": torch.from_numpy(data)}, decode)


def _decode(data: Bytes, kind: str) -> NDArray[np.float32]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    decoded: NDArray[np.float32] = dequantize(data, GGMLQuantizationType[kind])
    return decoded
