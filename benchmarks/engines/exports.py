"""A quantized form of the embedded model in a folder, by the code that `save=FOLDER export=FORMAT` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compose import configuration
from benchmarks.engines.cases import Case
from harness import models, quantization
from harness.models import Decoder
from harness.runs import save

MODEL = "smollm2_raw"
_CALIBRATION = (4, 64)


def write(case: Case, folder: Path) -> None:
    """Quantize the model and export it into `folder`.

    Raises: ValueError if the format cannot hold it.
    """
    saved = (f"export={case.export}", f"save={folder}")
    cfg = configuration(f"model={MODEL}", "execution=simulated", *saved, *case.overrides)
    source = models.open(cfg.model, cfg.seed)
    save.check(cfg, source, folder)
    model = source.load(torch.float32, torch.device("cpu"))
    decoder = Decoder(model)
    widths = {name: bits for name in decoder.linears() for part, bits in case.widths.items() if part in name}
    result = quantization.quantize(decoder, cfg, tokens(model, _CALIBRATION), widths=widths)
    if error := save.save(cfg, source, model, result):
        raise ValueError(error)


def tokens(model: nn.Module, shape: tuple[int, int]) -> Tensor:
    """Random tokens of the vocabulary of a model."""
    config: Any = model.config
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
