"""A quantized model as a folder that other programs load: config, tokenizer, and weights in one of their formats.

The folder is written beside its place, opened again by the reader of its format, compared with the model to the bit,
and renamed.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.core import FloatQTensor, QTensor, Scheme
from harness.core.formats import InputQuantizer
from harness.models.checkpoint import CONFIG, CheckpointError
from harness.models.exchange.awq import AWQWriter
from harness.models.exchange.compressed_writer import CompressedWriter
from harness.models.exchange.detect import reader_of
from harness.models.exchange.gptq import GPTQWriter
from harness.models.exchange.native import NativeWriter
from harness.models.exchange.writer import Writer
from harness.models.source import Source
from harness.nn import QuantLinear
from harness.utils.errors import LIMIT, short

WRITERS: Mapping[str, Writer] = {
    writer.name: writer for writer in (NativeWriter(), GPTQWriter(), AWQWriter(), CompressedWriter())
}

_LAST_BITS = 2.0**-22
_WEIGHTS = "model.safetensors"
_LEAST = 20  # characters of a path in a message


def check(folder: Path) -> None:
    """Raises: ValueError if the folder cannot be written, or already contains a model, which is never overwritten."""
    if (folder / _WEIGHTS).exists() or (folder / CONFIG).exists():
        raise ValueError(f"save={folder} already contains a model; choose another folder, or delete it")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        start, end = f"save={folder} cannot be written, because of ", "; choose another folder"
        raise ValueError(f"{start}{short(parent, max(LIMIT - len(start) - len(end), _LEAST))}{end}")


def export(
    model: nn.Module, weights: Mapping[str, QTensor], scheme: Scheme, source: Source, folder: Path, writer: Writer
) -> None:
    """Write the model, whose linears `weights` are quantized, into `folder`, which must not exist or be empty.

    `source` is that of the float model.
    Raises: ValueError if the format cannot hold a weight, the folder cannot be written, or the reopened linears differ.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        tensors, section = _parts(model, weights, scheme, writer)
        save_file(_apart(tensors), part / _WEIGHTS, {"format": "pt"})
        _write_settings(model, section, source.provenance(model), part)
        source.save_tokenizer(part)
        _compare(weights, part)
        part.chmod(0o755)
        (part / _WEIGHTS).chmod(0o644)
        if folder.exists():
            folder.rmdir()  # `check` found no model in it; another file makes this fail
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"save={folder} cannot be written ({error}); free disk space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _parts(
    model: nn.Module, weights: Mapping[str, QTensor], scheme: Scheme, writer: Writer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of the checkpoint by name, and the section of config.json that describes them."""
    tensors = _floats(model, set(weights))
    linears = {name: (_on_cpu(weight), _inputs_of(model, name)) for name, weight in weights.items()}
    writer = writer.fitted(linears)
    for name, (weight, inputs) in linears.items():
        tensors |= {f"{name}.{part}": tensor.cpu() for part, tensor in writer.parts(weight, inputs).items()}
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in weights]
    return tensors, writer.section(scheme, linears, others)


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


def _floats(model: nn.Module, quantized: set[str]) -> dict[str, Tensor]:
    """The parameters that stay floats, tied ones once, and the biases of quantized linears."""
    tensors = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    tensors = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in quantized}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and module.bias is not None:
            tensors[f"{name}.bias"] = module.bias.cpu()
    return tensors


def _compare(weights: Mapping[str, QTensor], folder: Path) -> None:
    """Raises: ValueError if a linear of the folder decodes to another weight."""
    try:
        reader = reader_of(json.loads((folder / CONFIG).read_text()), folder)
        for name, weight in weights.items():
            if not _same(reader.read(name).weight.dequantize(), _on_cpu(weight)):
                raise ValueError(f"{name} decodes to another weight after it was written; please report this")
    except CheckpointError as error:
        raise ValueError(f"the written folder cannot be read again: {error.detail}") from error


def _same(decoded: Tensor, weight: QTensor) -> bool:
    """Whether a decoded weight is that of a QTensor: to the bit, or to the last bit of a reciprocal of its scale."""
    expected = weight.dequantize()
    divided = isinstance(weight, FloatQTensor) and weight.tensor_scale is not None
    return torch.allclose(decoded, expected, rtol=_LAST_BITS, atol=0) if divided else torch.equal(decoded, expected)


def _on_cpu(weight: QTensor) -> QTensor:
    """The weight, or a copy of it, on the CPU."""
    return copy.deepcopy(weight).cpu() if next(weight.buffers()).is_cuda else weight
