"""Checkpoints that are quantized already: what their config, the files beside it and their tensors say they are.

Their tensors are codes, which a loader of float models takes for weights, or ignores. They are refused before any
weight is loaded, for every method, `method=none` included.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from harness.models.checkpoint import FLOATS, CheckpointError, Stored, read_json, weight_files

_SECTIONS = ("quantization_config", "compression_config", "quantization")  # the last: MLX
_SUBMODELS = ("text_config", "llm_config", "language_config")
_BITS = ("bits", "w_bit", "weight_bits", "num_bits", "nbits", "wbits")
# Files beside config.json that only quantized checkpoints have, and their format.
_FILES = {
    "quantize_config.json": "GPTQ or AWQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "quanto_qmap.json": "Quanto",
}
# Last parts of the names of tensors that only quantized checkpoints have, and their format.
_PARTS = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale": "codes with scales",
    "weight_scale_inv": "FP8 in blocks",
    "weight_scale_2": "ModelOpt",
    "SCB": "bitsandbytes, 8 bits",
    "absmax": "bitsandbytes, 4 bits",
    "quant_map": "bitsandbytes, 4 bits",
    "W_q": "HQQ",
    "Qidxs": "QuIP#",
}


def check_folder(config: Mapping[str, Any], folder: Path) -> None:
    """Check what config.json and the names of the files beside it say; `config` is the content of config.json.

    Raises: CheckpointError if they say that the weights are quantized.
    """
    for label, sub in (("", config), *((f"{name}.", config.get(name)) for name in _SUBMODELS)):
        for section in _SECTIONS:
            if isinstance(sub, Mapping) and sub.get(section):
                raise _refusal(f"{_method(sub[section])}, by {label}{section} of config.json")
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    if isinstance(dtype, torch.dtype) and dtype not in FLOATS:
        raise _refusal(f"dtype={name} in config.json")
    for file, kind in _FILES.items():
        if (folder / file).is_file():
            raise _refusal(f"{_described(kind, folder / file)}, by {file}")
    check_gguf(folder)


def check_gguf(folder: Path) -> None:
    """Raises: CheckpointError if the only weights in a folder are GGUF files."""
    gguf = [folder] if folder.suffix == ".gguf" else sorted(folder.glob("*.gguf"))
    if gguf and not weight_files(folder):
        raise _refusal(f"GGUF: {gguf[0].name}")


def check_tensors(tensors: Mapping[str, Stored]) -> None:
    """Check the names and dtypes of the tensors of a checkpoint.

    Raises: CheckpointError if they are those of a quantized model.
    """
    for name, stored in tensors.items():
        kind = next((_PARTS[part] for part in name.split(".")[-2:] if part in _PARTS), None)
        dtype = str(stored.dtype).removeprefix("torch.")
        if kind is not None:
            raise _refusal(f"{kind}, by {name}")
        if isinstance(stored.dtype, str) and (name.endswith("weight") or dtype.lower().startswith(("f4", "f6", "f8"))):
            raise _refusal(f"codes of dtype {dtype}, by {name}")


def _refusal(kind: str) -> CheckpointError:
    return CheckpointError("is quantized already", kind, "expected float weights, or method=checkpoint")


def _method(section: Any) -> str:
    """The method and number of bits of a section of config.json, with the values it has: "bitsandbytes, 8 bits"."""
    if not isinstance(section, Mapping):
        return str(section)
    bits = 8 if section.get("load_in_8bit") else 4 if section.get("load_in_4bit") else None
    named = section.get("quant_method") or section.get("quant_type")
    named = named or ("bitsandbytes" if "load_in_8bit" in section else "a method without a name")
    return _with_bits(str(named), bits or _bits(section) or _nested_bits(section))


def _nested_bits(section: Mapping[str, Any]) -> Any:
    """The bits of the first group of compressed-tensors."""
    groups = section.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    return _bits(first.get("weights")) if isinstance(first, Mapping) else None


def _bits(section: Any) -> Any:
    """The number of bits that a section of a JSON file names; None if it names none."""
    return next((section[key] for key in _BITS if section.get(key)), None) if isinstance(section, Mapping) else None


def _with_bits(kind: str, bits: Any) -> str:
    return f"{kind}, {bits} bits" if bits else kind


def _described(kind: str, file: Path) -> str:
    """The format of a file beside config.json, with its bits if the file has them."""
    try:
        content = read_json(file)
    except CheckpointError:
        return kind
    return _with_bits(kind, _bits(content.get("quantization", content)))
