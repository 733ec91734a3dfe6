"""Libraries that load a quantized folder as a model of transformers in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Engine:
    """A way to load a folder.

    name      in the table
    packages  whose versions decide what it does
    settings  makes the keywords of `from_pretrained`
    """

    name: str
    packages: tuple[str, ...]
    settings: Callable[[], dict[str, Any]] = dict

    def load(self, folder: Path) -> nn.Module:
        """The model of a folder, ready to run; whatever the library raises is passed on."""
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **self.settings())
        model: nn.Module = loaded
        return model.eval()

    @property
    def versions(self) -> dict[str, str | None]:
        """The version of each package; None if it is not installed."""
        return {package: _version(package) for package in self.packages}


def _dequantized() -> dict[str, Any]:
    from transformers import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def _auto_round() -> dict[str, Any]:
    from transformers import AutoRoundConfig

    return {"quantization_config": AutoRoundConfig()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


TRANSFORMERS = Engine("transformers", ("transformers", "compressed-tensors", "gptqmodel", "optimum"))
DEQUANTIZED = Engine("transformers, dequantize=True", ("transformers", "compressed-tensors"), _dequantized)
AUTO_ROUND = Engine("auto-round", ("transformers", "auto-round", "auto-round-lib"), _auto_round)
