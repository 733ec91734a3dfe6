"""Which reader a quantized folder needs: by its config.json, or by the files that older programs wrote beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.models.checkpoint import CheckpointError, read_json, weight_files
from harness.models.exchange.awq import AWQ
from harness.models.exchange.bnb import Bnb4, Bnb8
from harness.models.exchange.compressed import CompressedTensors
from harness.models.exchange.fp8 import FP8Blocks, ModelOpt
from harness.models.exchange.gptq import GPTQ, AutoRound
from harness.models.exchange.hqq import HQQ
from harness.models.exchange.mxfp4 import MXFP4
from harness.models.exchange.native import Native
from harness.models.exchange.quanto import Quanto
from harness.models.exchange.reader import Reader, Shapes, unsupported
from harness.models.exchange.torchao import TorchAO
from harness.models.tensors import TensorFiles

Json = Mapping[str, Any]

SECTIONS = ("quantization_config", "compression_config")
_SUBMODELS = ("text_config", "llm_config", "language_config")
# Files beside config.json, and the method of those that do not name theirs.
_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quanto_qmap.json": "quanto",
}
_PICKLE = "qmodel.pt"  # of hqq


def reader_of(config: Json, folder: Path, shapes: Callable[[], Shapes] = dict) -> Reader:
    """The reader of a folder; `config` is the content of its config.json, `shapes` is what a `Reader` takes.

    Raises: CheckpointError if the folder says nothing of a quantization, or no reader knows its format.
    """
    files = TensorFiles(folder)
    section = _section(config) or _beside(folder) or _in(files)
    if section is None:
        detail = f"config.json has no {SECTIONS[0]}"
        raise CheckpointError("is no quantized checkpoint", detail, "use method=none, or a method that quantizes it")
    method = str(section.get("quant_method"))
    choose = _READERS.get(method)
    if choose is None:
        raise unsupported("quant_method", method, f"one of: {', '.join(_READERS)}")
    return choose(section)(section, files, shapes)


def _section(config: Json) -> Json | None:
    for part in (config, *(config.get(name) for name in _SUBMODELS)):
        for name in SECTIONS:
            section = part.get(name) if isinstance(part, Mapping) else None
            if isinstance(section, Mapping) and section:
                return section
    return None


def _beside(folder: Path) -> Json | None:
    """The settings in a file beside config.json, with the keys of a section of config.json."""
    for name, method in _FILES.items():
        if (folder / name).is_file():
            content = read_json(folder / name)
            return {"quant_method": method, **content.get("quantization", content)}
    return None


def _in(files: TensorFiles) -> Json | None:
    """The settings of hqq's own files, whose tensors say everything.

    Raises: CheckpointError if they are a pickle.
    """
    if (files.folder / _PICKLE).is_file() and not weight_files(files.folder):
        remedy = "load it with hqq, and save it by save_to_safetensors"
        raise CheckpointError("has a format without a reader", f"{_PICKLE} is a pickle of hqq", remedy)
    hqq = weight_files(files.folder) and any(name.endswith(f".{HQQ.key}") for name in files.stored)
    return {"quant_method": HQQ.name} if hqq else None


def _of_bitsandbytes(section: Json) -> type[Reader]:
    return Bnb4 if section.get("load_in_4bit") or section.get("_load_in_4bit") else Bnb8


def _of_auto_round(section: Json) -> type[Reader]:
    """auto-round writes the layouts of other programs.

    Raises: CheckpointError if it is none of those that have a reader.
    """
    packing = str(section.get("packing_format", section.get("backend", "")))
    if "awq" in packing:
        return AWQ
    if "gptq" in packing:
        return GPTQ
    if packing == "auto_round":
        return AutoRound
    raise unsupported("packing_format", packing, "auto_round, auto_round:auto_gptq or auto_round:auto_awq")


_READERS: dict[str, Callable[[Json], type[Reader]]] = {
    "ptqbench": lambda _: Native,
    "gptq": lambda _: GPTQ,
    "awq": lambda _: AWQ,
    "auto-round": _of_auto_round,
    "compressed-tensors": lambda _: CompressedTensors,
    "fp8": lambda _: FP8Blocks,
    "modelopt": lambda _: ModelOpt,
    "bitsandbytes": _of_bitsandbytes,
    "mxfp4": lambda _: MXFP4,
    "hqq": lambda _: HQQ,
    "quanto": lambda _: Quanto,
    "torchao": lambda _: TorchAO,
}
