"""This project's own format, for every quantized weight: the stored bits of each linear beside all other parameters.

config.json         with a `quantization_config`: version, and for each linear what it is and what quantizes its inputs
model.safetensors   `<linear>.qweight`, `.scale`, `.zero_point` and other buffers, `<linear>.inputs.scale`,
                    `<linear>.bias`, and other parameters under their names
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from harness.core import QTensor, Scheme
from harness.core.formats import InputQuantizer
from harness.models.exchange.codec import describe, describe_inputs, rebuild, rebuild_inputs
from harness.models.exchange.folder_writer import FolderWriter, Linears
from harness.models.exchange.reader import Reader, StoredLinear, Tensors, bits_of, damaged, unsupported

VERSION = 2
_INPUTS, _BIAS = "inputs.", "bias"


class Native(Reader):
    """Linears that the section describes."""

    name = "ptqbench"
    key = ""  # the section names the linears
    parts = ()

    @cached_property
    def linears(self) -> dict[str, list[str]]:
        described = self._described
        found: dict[str, list[str]] = {name: [] for name in described}
        for tensor in self.files.stored:
            name, part = _owner(tensor, described)
            if name is not None and part != _BIAS:
                found[name].append(part)
        return found

    def read(self, name: str) -> StoredLinear:
        tensors, settings = self.tensors(name), self._described[name]
        buffers = {part: tensor for part, tensor in tensors.items() if not part.startswith(_INPUTS)}
        inputs = {part.removeprefix(_INPUTS): tensors[part] for part in tensors if part not in buffers}
        weight = rebuild(settings["weight"], buffers)
        return StoredLinear(weight, bits_of(buffers), rebuild_inputs(settings.get("inputs"), inputs))

    @cached_property
    def _described(self) -> Mapping[str, Any]:
        if (version := self.section.get("version")) != VERSION:
            raise unsupported("version", version, str(VERSION))
        linears = self.section.get("linears")
        if not isinstance(linears, dict) or not all(isinstance(item, dict) for item in linears.values()):
            raise damaged("its quantization section describes no linears")
        return linears


class NativeWriter(FolderWriter):
    """Holds every scheme, and codes that are no scheme."""

    name = "native"

    def check(self, scheme: Scheme) -> None:
        pass

    def section(self, scheme: Scheme, linears: Linears, floats: list[str]) -> dict[str, Any]:
        described = {
            name: {"weight": describe(weight), "inputs": describe_inputs(inputs)}
            for name, (weight, inputs) in linears.items()
        }
        return {"quant_method": Native.name, "version": VERSION, "scheme": scheme.name, "linears": described}

    def parts(self, weight: QTensor, inputs: InputQuantizer | None) -> Tensors:
        calibrated = {} if inputs is None else {f"{_INPUTS}{name}": buffer for name, buffer in inputs.named_buffers()}
        return dict(weight.named_buffers()) | calibrated


def _owner(tensor: str, linears: Mapping[str, Any]) -> tuple[str | None, str]:
    """The linear whose part a tensor is, and the part; None if it is no part of one."""
    pieces = tensor.split(".")
    for length in range(len(pieces) - 1, 0, -1):
        name = ".".join(pieces[:length])
        if name in linears:
            return name, ".".join(pieces[length:])
    return None, tensor
