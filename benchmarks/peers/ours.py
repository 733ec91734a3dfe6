"""A model in this project: float, or rounded to nearest, eager or compiled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness import models, quantization
from harness.config import DataConfig, MeasureConfig, ModelConfig, RunConfig
from harness.core import IntWeight, Scheme
from harness.evaluation.compiled import Compiled
from harness.evaluation.workload import Eager, Workload
from harness.models import Decoder
from methods.rtn import RTN

_ANY_TOKENS = torch.zeros(1, 8, dtype=torch.int64)  # rounding to nearest reads none


@dataclass(frozen=True)
class Form:
    """A quantized form of a model; `group_size` None: float linears; `head` None: a float head."""

    dtype: torch.dtype = torch.float32
    group_size: int | None = None
    head: int | None = None

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        weights = dtype if self.group_size is None else f"int4 g{self.group_size} in {dtype}"
        return weights + ("" if self.head is None else f" head={self.head}")


def load(model_cfg: ModelConfig, form: Form) -> nn.Module:
    """The model in a form, packed."""
    model = models.open(model_cfg, seed=0).load(form.dtype, torch.device("cpu"))
    if form.group_size is not None:
        fmt = IntWeight(bits=4, granularity="group", group_size=form.group_size)
        scheme = Scheme(name=f"group{form.group_size}", weight=fmt)
        cfg = RunConfig(
            model=model_cfg,
            data=DataConfig(source="pydocs"),
            measure=MeasureConfig(),
            scheme=scheme,
            steps={"rtn": RTN()},
        )
        quantization.quantize(Decoder(model), cfg, _ANY_TOKENS)
    if form.head is not None:
        quantization.quantize_head(model, form.head, "packed", [])
    elif form.group_size is not None:
        quantization.pack_head(model)
    return model


@torch.inference_mode()
def workload(model: nn.Module, prompt: Tensor, decoded: Tensor, runtime: str) -> Workload:
    """The timed calls of a model.

    Raises: ValueError if it cannot be compiled.
    """
    return Compiled(model, prompt, decoded) if runtime == "compiled" else Eager(model, prompt, decoded)
