"""Folders that transformers writes by libraries without calibration: torchao 0.18, bitsandbytes 0.50.2, HQQ 0.2.8."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.checkpoints.files import FLOAT, once


def torchao(model: str, folder: Path) -> None:
    """Write int8 in rows, and int4 in groups of 32."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    def four_bits() -> Any:
        import torch

        width: Any = torch
        return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=width.int4, granularity=PerGroup(32)))

    _write(folder, "torchao_int8", lambda: TorchAoConfig(Int8WeightOnlyConfig()))
    _write(folder, "torchao_int4", four_bits)


def bitsandbytes(model: str, folder: Path) -> None:
    """Write NF4, with scales in float32 and quantized again, and 8 bits."""
    from transformers import BitsAndBytesConfig

    for name, double in (("bitsandbytes_nf4", False), ("bitsandbytes_nf4_double", True)):
        options: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
        _write(folder, name, lambda options=options: BitsAndBytesConfig(load_in_4bit=True, **options))  # type: ignore[misc]
    _write(folder, "bitsandbytes_int8", lambda: BitsAndBytesConfig(load_in_8bit=True))


def hqq(model: str, folder: Path) -> None:
    """Write 4 and 3 bits in groups of 64."""
    from transformers import HqqConfig

    for bits in (4, 3):
        _write(folder, f"hqq_{bits}", lambda bits=bits: HqqConfig(nbits=bits, group_size=64, axis=1))  # type: ignore[misc]


def _write(folder: Path, name: str, config: Callable[[], Any]) -> None:
    """Quantize the float model as `config` says, and save it."""
    from transformers import AutoModelForCausalLM

    def write(part: Path) -> None:
        options = {"quantization_config": config(), "device_map": "cpu", "dtype": "float32"}
        AutoModelForCausalLM.from_pretrained(folder / FLOAT, **options).save_pretrained(part)
        for file in (folder / FLOAT).glob("tokenizer*"):  # an older transformers does not know its class
            shutil.copy(file, part)

    once(folder / name, write)
