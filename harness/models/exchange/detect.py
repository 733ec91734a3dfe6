"""Which reader a quantized folder needs: by its config.json, or by the files that older programs wrote beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.models.checkpoint import CheckpointError, read_json
from harness.models.exchange.awq import AWQ
from harness.models.exchange.bnb import Bnb4, Bnb8
from harness.models.exchange.compressed import CompressedTensors
from harness.models.exchange.fp8 import FP8Blocks, ModelOpt
from harness.models.exchange.gptq import GPTQ, AutoRound
from harness.models.exchange.native import Native
from harness.models.exchange.reader import Reader, unsupported
from harness.models.tensors import TensorFiles

Json = Mapping[str, Any]

SECTIONS = ("quantization_config", "compression_config")
_SUBMODELS = ("text_config", "llm_config", "language_config")
# Files beside config.json, and the method of those that do not name theirs.
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def reader_of(config: Json, folder: Path) -> Reader:
    """The reader of a folder; `config` is the content of its config.json.

    Raises: CheckpointError if the folder says nothing of a quantization, or no reader knows its format.
    """
    section = _section(config) or _beside(folder)
    if section is None:
        detail = f"config.json has no {SECTIONS[0]}"
        raise CheckpointError("is no quantized checkpoint", detail, "use method=none, or a method that quantizes it")
    method = str(section.get("quant_method"))
    choose = _READERS.get(method)
    if choose is None:
        raise unsupported("quant_method", method, f"one of: {', '.join(_READERS)}")
    return choose(section)(section, TensorFiles(folder))


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
}
