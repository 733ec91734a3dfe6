"""Calibration and quantization of a whole model; each call discovers the model's decoder again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from harness import calibration, quantization
from harness.calibration import Stream
from harness.evaluation import sensitivity
from harness.models import Decoder


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The present linears of the decoder blocks, by name."""
    return Decoder(model).linears()


def quantize(model: nn.Module, *arguments: Any, **options: Any) -> quantization.Result:
    return quantization.quantize(Decoder(model), *arguments, **options)


def stream(model: nn.Module, tokens: Tensor) -> Stream:
    return Stream(Decoder(model), tokens)


def verify(model: nn.Module, tokens: Tensor) -> None:
    calibration.verify(Decoder(model), tokens)


def sensitivities(model: nn.Module, *arguments: Any) -> sensitivity.Sensitivity:
    return sensitivity.measure(Decoder(model), *arguments)
