"""A quantized model on disk: the stored bits of each linear and all other parameters in one safetensors file.

    FOLDER/model.safetensors   `<linear>.qweight`, `.scale`, `.zero_point`, `.bias`; other parameters under their names
    FOLDER/quantized.json      version, scheme, shapes of the linears, source of the weights

Loading needs a float model of the same configuration, with any weights: its linears are replaced by those of the file.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.config import build
from harness.core import IntQTensor, IntWeight, QTensor, Scheme
from harness.core.formats import InputQuantizer
from harness.nn import QuantLinear, replace
from harness.utils.errors import LIMIT, short
from harness.utils.files import replacing

VERSION = 1
_WEIGHTS, _METADATA = "model.safetensors", "quantized.json"
_LEAST = 20  # characters of a path in a message


def check(folder: Path) -> None:
    """Raises: ValueError if the folder cannot be written, or already contains a model, which is never overwritten."""
    if (folder / _WEIGHTS).exists():
        raise ValueError(f"save={folder} already contains a model; choose another folder, or delete it")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        start, end = f"save={folder} cannot be written, because of ", "; choose another folder"
        raise ValueError(f"{start}{short(parent, max(LIMIT - len(start) - len(end), _LEAST))}{end}")


def save(model: nn.Module, weights: dict[str, QTensor], scheme: Scheme, source: dict[str, Any], folder: Path) -> None:
    """Write a quantized model; `weights` are the QTensors of its linears by name, `source` is the weights' provenance.

    Raises: ValueError if the file format cannot store a kind of weight, or the folder cannot be written.
    """
    for name, weight in weights.items():
        if not isinstance(weight, IntQTensor):
            raise ValueError(
                f"save={folder}: {name} is a {type(weight).__name__}; expected integer codes with scale and "
                "zero point, choose another method or save=null"
            )
    tensors = _other_tensors(model) | {
        f"{name}.{part}": buffer for name, weight in weights.items() for part, buffer in weight.named_buffers()
    }
    metadata = {
        "version": VERSION,
        "scheme": dataclasses.asdict(scheme),
        "source": source,
        "linears": {name: list(weight.shape) for name, weight in weights.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / _WEIGHTS) as part:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)
            (folder / _METADATA).write_text(json.dumps(metadata, indent=2) + "\n")
    except (OSError, SafetensorError) as error:  # a full disk raises either
        raise ValueError(
            f"save={folder} cannot be written ({error}); free disk space or choose another folder"
        ) from error


def load(model: nn.Module, folder: Path) -> nn.Module:
    """Load the quantized linears, packed, and all other parameters of a folder into `model`; returns `model`.

    `model` is a float model of the same configuration; its dtype is the dtype of the loaded model.
    Raises: ValueError if `save` did not write the folder, or it does not fit the model.
    """
    try:
        metadata = json.loads((folder / _METADATA).read_text())
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is not a quantized model ({error}); expected a folder that save=FOLDER wrote"
        ) from error
    if metadata["version"] != VERSION:
        raise ValueError(f"{folder} has version {metadata['version']}; expected {VERSION}")
    scheme = build(Scheme, metadata["scheme"], "scheme")
    assert isinstance(scheme.weight, IntWeight)  # `save` refuses other weights
    modules = dict(model.named_modules())
    _check_names(folder, [name for name in metadata["linears"] if name not in modules])
    for name, (rows, columns) in metadata["linears"].items():
        buffers = {part: tensors.pop(f"{name}.{part}") for part in _parts(name, tensors)}
        weight = IntQTensor.stored(buffers, (rows, columns), scheme.weight)
        replace(model, name, _linear(model.get_submodule(name), weight, buffers, scheme))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    _check_names(folder, [*unexpected, *_absent(model, set(missing))])
    return model


def _linear(float_linear: nn.Module, weight: QTensor, buffers: dict[str, Tensor], scheme: Scheme) -> QuantLinear:
    """The packed linear that replaces `float_linear`, with its dtype and device."""
    input_quantizer = None
    if scheme.activation is not None:
        input_quantizer = InputQuantizer(scheme.activation)
        for part in ("scale", "zero_point") if not scheme.activation.dynamic else ():
            fixed = part == "zero_point" and scheme.activation.symmetric  # which version 1 stores too
            input_quantizer.register_buffer(part, None if fixed else buffers[f"input_quantizer.{part}"])
    float_weight = float_linear.weight
    assert isinstance(float_weight, Tensor)
    linear = QuantLinear(weight, buffers.get("bias"), float_weight.dtype, input_quantizer)
    return linear.to(float_weight.device).pack()


def _parts(name: str, tensors: dict[str, Tensor]) -> list[str]:
    """The last parts of the names of all tensors of the linear `name`: qweight, scale, bias, ..."""
    return [key.removeprefix(f"{name}.") for key in tensors if key.startswith(f"{name}.")]


def _other_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters, and the biases and static input scales and zero points of its quantized linears."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())  # tied parameters only once
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            tensors |= {f"{name}.bias": module.bias} if module.bias is not None else {}
            static = module.input_quantizer.named_buffers() if module.input_quantizer is not None else ()
            tensors |= {f"{name}.input_quantizer.{part}": buffer for part, buffer in static}
    return tensors


def _absent(model: nn.Module, missing: set[str]) -> list[str]:
    """Names of parameters that the file lacks, without those tied to a parameter in the file."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    present = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    return [name for name, parameter in parameters.items() if name in missing and id(parameter) not in present]


def _check_names(folder: Path, unmatched: list[str]) -> None:
    """Raises: ValueError if a name is in the file or in the model, but not in both."""
    if unmatched:
        raise ValueError(
            f"{folder} does not fit the model: {unmatched[0]} is in only one of them; use the configuration of the run "
            "that saved it"
        )
