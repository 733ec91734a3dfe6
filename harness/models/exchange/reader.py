"""What every reader of a quantized checkpoint gives: linears with their stored bits, and tensors that are floats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from harness.core import QTensor, WeightFormat
from harness.core.formats import InputQuantizer
from harness.core.formats.qtensor import GroupedQTensor
from harness.models.checkpoint import DOWNLOAD, CheckpointError
from harness.models.tensors import TensorFiles

Tensors = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, int]]
Q = TypeVar("Q", bound=GroupedQTensor)


@dataclass(frozen=True)
class StoredLinear:
    """One quantized linear of a checkpoint, or the same linear of all experts in one tensor.

    weight       one of this project's QTensors if its format is one of them, else a `FileQTensor`
    stored_bits  of all tensors of the weight in the file: codes, scales, zero points, tables, and what is redundant
    inputs       what quantizes its inputs, if the checkpoint prescribes that
    label        its format's own name, if it has one
    experts      E, if the weight (E N, K) has the rows of E experts, one expert behind another
    """

    weight: QTensor
    stored_bits: int
    inputs: InputQuantizer | None = None
    label: str = ""
    experts: int | None = None


class FileQTensor(QTensor):
    """A weight in the bytes of its file, in a format that is none of this project's; `decode` is that of its reader."""

    def __init__(
        self, shape: tuple[int, int], label: str, tensors: Tensors, decode: Callable[[Tensors], Tensor]
    ) -> None:
        """`label` names the format; `decode` makes the float32 weight (N, K) from `tensors`."""
        super().__init__(shape)
        self.label = label
        self._decode = decode
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._decode(dict(self.named_buffers())).to(dtype)


class Reader(ABC):
    """The quantized linears of a checkpoint in one file format.

    name   the format in tables and messages: gptq
    key    a part that only quantized linears have: `<linear>.<key>` is a tensor
    parts  all parts of a linear that are no float weight and no bias
    joint  what is between the names of a linear and of a part
    """

    name: ClassVar[str]
    key: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    joint: str = "."

    def __init__(self, section: Mapping[str, Any], files: TensorFiles, shapes: Callable[[], Shapes] = dict) -> None:
        """`section` is the mapping of config.json, or of the file beside it, that describes the format.

        `shapes` computes N and K of each linear of the model, by name, for formats whose files do not say them.
        """
        self.section = section
        self.files = files
        self._shapes = shapes

    @cached_property
    def shapes(self) -> Shapes:
        """N and K of each linear of the model."""
        return self._shapes()

    @cached_property
    def linears(self) -> dict[str, list[str]]:
        """The parts that each quantized linear has, by the name of the linear."""
        suffix = f"{self.joint}{self.key}"
        names = [name.removesuffix(suffix) for name in self.files.stored if name.endswith(suffix)]
        return {name: [part for part in self.parts if self.tensor(name, part) in self.files.stored] for name in names}

    @cached_property
    def floats(self) -> list[str]:
        """The names of the tensors that are no part of a quantized linear."""
        quantized = {self.tensor(name, part) for name, parts in self.linears.items() for part in parts}
        return [name for name in self.files.stored if name not in quantized]

    @property
    def notes(self) -> list[str]:
        """What the checkpoint prescribes and a run does not apply, for the record."""
        return []

    @abstractmethod
    def read(self, name: str) -> StoredLinear:
        """The linear of this name.

        Raises: CheckpointError if its tensors do not fit each other or the format.
        """

    def tensor(self, name: str, part: str) -> str:
        """The name of a linear's tensor in the file."""
        return f"{name}{self.joint}{part}"

    def parameter(self, tensor: str) -> str:
        """The name in the model of a tensor that is no part of a quantized linear."""
        return tensor

    def tensors(self, name: str, required: tuple[str, ...] = ()) -> Tensors:
        """The tensors of a linear, by their parts.

        Raises: CheckpointError if one of `required` is absent.
        """
        for part in required:
            self.files.require(self.tensor(name, part))
        return {part: self.files.read(self.tensor(name, part)) for part in self.linears[name]}


def expect(
    linear: str, part: str, tensor: Tensor, dtypes: torch.dtype | tuple[torch.dtype, ...], *shape: int
) -> Tensor:
    """The tensor `<linear>.<part>`, checked.

    `shape` may have -1 for any size.
    Raises: CheckpointError if it has another dtype or shape.
    """
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    fits = tensor.dim() == len(shape) and all(
        want in (-1, size) for want, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes:
        wanted = "x".join("any" if size == -1 else str(size) for size in shape)
        names = " or ".join(_name(dtype) for dtype in dtypes)
        stored = f"{_name(tensor.dtype)} {'x'.join(map(str, tensor.shape))}"
        raise damaged(f"{linear}.{part} is {stored}, expected {names} {wanted}")
    return tensor


def damaged(detail: str) -> CheckpointError:
    """The error of a checkpoint whose tensors or settings do not fit each other."""
    return CheckpointError("cannot be read", detail, DOWNLOAD)


def unsupported(key: str, value: object, expected: str) -> CheckpointError:
    """The error of a setting of a checkpoint that this project has no reader for."""
    detail = f"{key}={value} in its quantization section, expected {expected}"
    return CheckpointError("has a format without a reader", detail, "use another checkpoint of the model")


def bits_of(tensors: Tensors, *without: str) -> int:
    """Bits of tensors in their file, but for those of the parts `without`."""
    return sum(8 * tensor.nbytes for part, tensor in tensors.items() if part not in without)


def restored(kind: type[Q], shape: tuple[int, int], fmt: WeightFormat, buffers: Mapping[str, Tensor | None]) -> Q:
    """A QTensor of the class `kind` from its buffers, without rounding anything."""
    weight = kind.__new__(kind)
    GroupedQTensor.__init__(weight, shape, fmt)
    for name, buffer in buffers.items():
        weight.register_buffer(name, buffer)
    return weight


def group_size(linear: str, columns: int, groups: int) -> int:
    """Inputs of a group, for K = `columns` inputs in so many groups.

    Raises: CheckpointError if they are not equal groups.
    """
    if groups < 1 or columns % groups:
        raise damaged(f"{linear} has {columns} inputs and {groups} groups of scales")
    return columns // groups


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
