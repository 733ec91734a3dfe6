"""What the tools start from: the float model as a folder and as a GGUF file, and calibration tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.checkpoints.files import CALIBRATION, FLOAT, GGUF, once


def prepare(model: str, folder: Path) -> None:
    """Write the three for a model of conf/model: float32 weights, and the tokens (32, 512) of its runs on pydocs."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.compose import configuration
    from harness import models
    from harness.data import calibration
    from harness.models import gguf
    from harness.models.exchange.gguf_file import write_gguf

    cfg = configuration(f"model={model}", "data=pydocs")
    source = models.open(cfg.model, cfg.seed)

    def write(part: Path) -> None:
        loaded = source.load(torch.float32, torch.device("cpu"))
        write_gguf(part, model, loaded, {}, source.transformers_tokenizer())

    tokens = calibration(cfg.data, source.tokenizer, cfg.seed).windows
    converted = gguf.folder(str(cfg.model.package), cfg.model.factor_seed)
    once(folder / FLOAT, lambda part: shutil.copytree(converted, part))
    once(folder / GGUF, write)
    once(folder / CALIBRATION, lambda part: save_file({"tokens": tokens.contiguous()}, part))
