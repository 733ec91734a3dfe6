"""Puts the quantized linears of a checkpoint into the model that was loaded from it with decoded weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from harness.config import RunConfig
from harness.models import Decoder, QuantizedSource, weight_of
from harness.models.exchange.labels import bits_of_codes, label_of
from harness.models.exchange.reader import StoredLinear
from harness.nn import QuantLinear, replace
from harness.quantization.install import convert, float_row
from harness.quantization.joining import join_linears
from harness.quantization.result import Result, Row, sizes
from harness.utils.names import kind_of
from harness.utils.progress import Track, silent


@torch.no_grad()
def adopt(decoder: Decoder, source: QuantizedSource, cfg: RunConfig, track: Track = silent) -> Result:
    """Replace each linear of the model by the one that the checkpoint has, in the configured execution.

    Bits are those of the file. Linears that the checkpoint has as floats stay floats; the result's warnings name them.
    """
    result, model = Result(), decoder.model
    linears = decoder.linears()
    rows: dict[str, Row] = {name: float_row(name, weight_of(module)) for name, module in linears.items()}
    stored = track(source.stored(model), "reading", source.size)
    for name, linear in stored:
        if linear is None:
            result.warnings.append(f"{name} is decoded: no linear of the model has its weight")
            continue
        kernel = _install(model, name, linear, cfg.execution)
        result.kernels |= {kernel} if kernel else set()
        if name in rows:
            rows[name] = _row(name, linear)
    result.layers = list(rows.values())
    result.warnings += _floats(rows)
    if cfg.execution == "packed":
        result.joined = join_linears(decoder)
    result.sizes = sizes(decoder.blocks or [model])
    return result


def _install(model: nn.Module, name: str, linear: StoredLinear, execution: str) -> str | None:
    """Returns: the kernel of the linear; None if it is simulated."""
    module = model.get_submodule(name)
    weight, bias = weight_of(module), getattr(module, "bias", None)
    quantized = QuantLinear(linear.weight, bias, weight.dtype, linear.inputs).to(weight.device)
    quantized.stored_bits = linear.stored_bits
    replace(model, name, quantized)
    return convert(quantized, execution)


def _row(name: str, linear: StoredLinear) -> Row:
    """The record's row of a linear of the checkpoint."""
    rows, columns = linear.weight.shape
    return {
        "name": name,
        "shape": [rows, columns],
        "stored_bits": linear.stored_bits,
        "bits_per_weight": linear.stored_bits / (rows * columns),
        "format": linear.label or label_of(linear.weight),
        "bits": bits_of_codes(linear.weight),
    }


def _floats(rows: dict[str, Row]) -> Iterator[str]:
    """A warning for each kind of linear that the checkpoint has as floats, if it has others."""
    floats = [name for name, row in rows.items() if "format" not in row]
    kinds: dict[str, list[str]] = {}
    for name in floats if len(floats) < len(rows) else []:
        kinds.setdefault(kind_of(name), []).append(name)
    for kind, names in kinds.items():
        yield f"{names[0] if len(names) == 1 else kind} stays float in the checkpoint"
