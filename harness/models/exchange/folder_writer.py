"""Writes a folder in the format of transformers: config.json with its section, weights, and the tokenizer."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from harness.core import QTensor, Scheme
from harness.core.formats import InputQuantizer
from harness.models.checkpoint import CONFIG
from harness.models.exchange.reader import Tensors
from harness.models.exchange.writer import Quantized, Writer, float_tensors
from harness.nn import QuantLinear

Linears = Mapping[str, tuple[QTensor, InputQuantizer | None]]  # each with what quantizes its inputs, by name

WEIGHTS = "model.safetensors"


class FolderWriter(Writer):
    """The layout of linears in one format."""

    def fitted(self, linears: Linears) -> FolderWriter:
        """The variant of the format that holds these linears."""
        return self

    @abstractmethod
    def section(self, scheme: Scheme, linears: Linears, floats: list[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json; `floats` are the linears that stay floats."""

    @abstractmethod
    def parts(self, weight: QTensor, inputs: InputQuantizer | None) -> Tensors:
        """The tensors of a linear, by the part of their name behind that of the linear.

        Raises: ValueError if the format cannot hold the weight.
        """

    def write(self, quantized: Quantized, folder: Path) -> None:
        model = quantized.model
        linears = {name: (weight, _inputs_of(model, name)) for name, weight in quantized.linears()}
        tensors, fitted = float_tensors(model, linears), self.fitted(linears)
        for name, (weight, inputs) in linears.items():
            tensors |= {f"{name}.{part}": tensor.cpu() for part, tensor in fitted.parts(weight, inputs).items()}
        save_file(_apart(tensors), folder / WEIGHTS, {"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)
        others = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name not in linears]
        section = fitted.section(quantized.scheme, linears, others)
        _write_settings(model, section, quantized.source.provenance(model), folder)
        if (tokenizer := quantized.source.transformers_tokenizer()) is not None:
            tokenizer.save_pretrained(folder)


def _write_settings(model: Any, section: dict[str, Any], provenance: dict[str, Any], folder: Path) -> None:
    """Write config.json with the section, and the settings of generation."""
    model.config.save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text())
    config |= {"architectures": [type(model).__name__], "quantization_config": section, "quantized_from": provenance}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, and copies of those that share memory with an earlier one, such as a table of levels."""
    memory: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        out[name] = tensor.contiguous().clone() if place in memory else tensor.contiguous()
        memory.add(place)
    return out


def _inputs_of(model: nn.Module, name: str) -> InputQuantizer | None:
    """What quantizes the inputs of a linear."""
    module = model.get_submodule(name)
    return module.input_quantizer if isinstance(module, QuantLinear) else None
