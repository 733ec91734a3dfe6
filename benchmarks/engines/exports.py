"""A quantized form of the embedded model in a folder, by the code that `save=FOLDER export=FORMAT` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks.engines.cases import Case
from harness import models, quantization
from harness.config import RunConfig, build_run
from harness.models import Decoder
from harness.runs import save

MODEL = "smollm2_raw"
_ROOT = Path(__file__).parents[2]
_CALIBRATION = (4, 64)


def write(case: Case, folder: Path) -> None:
    """Quantize the model and export it into `folder`.

    Raises: ValueError if the format cannot hold it.
    """
    cfg = configuration(f"model={MODEL}", f"export={case.export}", f"save={folder}", *case.overrides)
    save.check(cfg, folder)
    source = models.open(cfg.model, cfg.seed)
    model = source.load(torch.float32, torch.device("cpu"))
    decoder = Decoder(model)
    widths = {name: bits for name in decoder.linears() for part, bits in case.widths.items() if part in name}
    result = quantization.quantize(decoder, cfg, tokens(model, _CALIBRATION), widths=widths)
    if error := save.save(cfg, source, model, result):
        raise ValueError(error)


def configuration(*overrides: str) -> RunConfig:
    """The configuration of a simulated run."""
    with initialize_config_dir(version_base="1.3", config_dir=str(_ROOT / "conf")):
        resolved = OmegaConf.to_container(compose("config", ["execution=simulated", *overrides]), resolve=True)
    return build_run(resolved)  # type: ignore[arg-type]  # the container of a mapping is a dict


def tokens(model: nn.Module, shape: tuple[int, int]) -> Tensor:
    """Random tokens of the vocabulary of a model."""
    config: Any = model.config
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
