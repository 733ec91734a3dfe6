"""Folders of tools that calibrate: auto-round 0.16.1."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.checkpoints.files import CALIBRATION, FLOAT, once

WIDTHS = (4,)
_GROUP, _STEPS = 64, 200


def auto_round(model: str, folder: Path) -> None:
    """Write a folder for each width: groups of 64 with zero points, 200 steps a block, the layout of GPTQ."""
    for bits in WIDTHS:
        once(folder / f"auto-round_{bits}", lambda part, bits=bits: _auto_round(folder, part, bits))  # type: ignore[misc]


def _auto_round(folder: Path, part: Path, bits: int) -> None:
    from auto_round import AutoRound  # type: ignore[import-not-found]  # in the tool's environment
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = load_file(folder / CALIBRATION)["tokens"]
    model = AutoModelForCausalLM.from_pretrained(folder / FLOAT, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder / FLOAT)
    calibration = [{"input_ids": row[None]} for row in tokens]
    options = {
        "iters": _STEPS,
        "nsamples": len(tokens),
        "seqlen": tokens.shape[1],
        "device_map": "cpu",
        "enable_torch_compile": False,
    }
    AutoRound(
        model, tokenizer, bits=bits, group_size=_GROUP, sym=False, dataset=calibration, **options
    ).quantize_and_save(str(part), format="auto_round:auto_gptq")
    nested = next(part.rglob("config.json")).parent
    for file in list(nested.iterdir()) if nested != part else []:
        file.rename(part / file.name)
    for empty in [path for path in part.iterdir() if path.is_dir()]:
        shutil.rmtree(empty)
