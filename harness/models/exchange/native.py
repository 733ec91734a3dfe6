"""A quantized model on disk: the stored bits of each linear and every other parameter, in one safetensors file.

    FOLDER/model.safetensors   `<linear>.qweight`, `.scale`, `.zero_point`, `.bias`; other parameters by their names
    FOLDER/quantized.json      version, scheme, the linears with their shapes, the model's source

Loading needs the float model's own configuration alone: its linears are replaced by those of the file.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.config import build
from harness.core import IntQTensor, QTensor, Scheme
from harness.core.formats import InputQuantizer
from harness.nn import QuantLinear, replace
from harness.utils.files import replacing

VERSION = 1
_WEIGHTS, _ABOUT = "model.safetensors", "quantized.json"


def check(folder: Path) -> None:
    """Raises: ValueError if a folder holds a model already, which is never overwritten."""
    if (folder / _WEIGHTS).exists():
        raise ValueError(f"save={folder} holds a model already; name another folder, or delete it")


def save(model: nn.Module, weights: dict[str, QTensor], scheme: Scheme, source: dict[str, Any], folder: Path) -> None:
    """Write a quantized model; `weights` are the QTensors of its linears by name, `source` says whence it came.

    Raises: ValueError if a weight is of a kind that has no place in the file, or the folder cannot be written.
    """
    for name, weight in weights.items():
        if not isinstance(weight, IntQTensor):
            raise ValueError(
                f"save={folder}: {name} is a {type(weight).__name__}; expected integer codes with scale and "
                "zero point, choose another method or save=null"
            )
    tensors = _unshared(model) | {
        f"{name}.{part}": buffer for name, weight in weights.items() for part, buffer in weight.named_buffers()
    }
    about = {
        "version": VERSION,
        "scheme": dataclasses.asdict(scheme),
        "source": source,
        "linears": {name: list(weight.shape) for name, weight in weights.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / _WEIGHTS) as part:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)
            (folder / _ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"save={folder} cannot be written ({error}); free space or name another folder") from error


def load(model: nn.Module, folder: Path) -> nn.Module:
    """Put the quantized linears and all other parameters of a folder into `model`, packed; returns it.

    `model` is the float one of the same configuration, in the dtype that it is to run in.
    Raises: ValueError if the folder is none of `save`'s, or does not fit the model.
    """
    try:
        about = json.loads((folder / _ABOUT).read_text())
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no quantized model ({error}); expected what save=FOLDER wrote") from error
    if about["version"] != VERSION:
        raise ValueError(f"{folder} has version {about['version']}; expected {VERSION}")
    scheme = build(Scheme, about["scheme"], "scheme")
    modules = dict(model.named_modules())
    _fits(folder, [name for name in about["linears"] if name not in modules])
    for name in about["linears"]:
        own = {key: tensors.pop(f"{name}.{key}") for key in _parts(name, tensors)}
        replace(model, name, _linear(name, own, tuple(about["linears"][name]), scheme, model))
    missing, unknown = model.load_state_dict(tensors, strict=False)
    _fits(folder, [*unknown, *_absent(model, set(missing))])
    return model


def _linear(name: str, own: dict[str, Tensor], shape: tuple[int, ...], scheme: Scheme, model: nn.Module) -> QuantLinear:
    weight = IntQTensor.stored(own, (shape[0], shape[1]), scheme.weight)
    float_weight = model.get_submodule(name).weight
    rounding = None
    if scheme.activation is not None:
        rounding = InputQuantizer(scheme.activation)
        for part in ("scale", "zero_point"):
            if f"input_quantizer.{part}" in own:
                rounding.register_buffer(part, own[f"input_quantizer.{part}"])
    assert isinstance(float_weight, Tensor)
    return QuantLinear(weight, own.get("bias"), float_weight.dtype, rounding).to(float_weight.device).pack()


def _parts(name: str, tensors: dict[str, Tensor]) -> list[str]:
    return [key.removeprefix(f"{name}.") for key in tensors if key.startswith(f"{name}.")]


def _unshared(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters, each once, and of quantized linears what stands beside the weight."""
    found: dict[str, Tensor] = dict(model.named_parameters())  # a tied weight comes once
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found |= {f"{name}.bias": module.bias} if module.bias is not None else {}
            static = module.input_quantizer.named_buffers() if module.input_quantizer is not None else ()
            found |= {f"{name}.input_quantizer.{part}": buffer for part, buffer in static}
    return found


def _absent(model: nn.Module, missing: set[str]) -> list[str]:
    """Parameters that the file lacks, and that share their memory with none that it has."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    present = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    return [name for name, parameter in parameters.items() if name in missing and id(parameter) not in present]


def _fits(folder: Path, alone: list[str]) -> None:
    """Raises: ValueError if there are names that either the file or the model has `alone`."""
    if alone:
        raise ValueError(f"{folder} does not fit the model: {alone[0]} is in one of them alone")
