"""Puts the quantized linears of a checkpoint into the model that was loaded from it with decoded weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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

    Bits are those of the file. Linears that the checkpoint has as floats stay floats, and experts in one tensor stay
    decoded; the result's warnings name them.
    """
    result, model = Result(), decoder.model
    linears = decoder.linears()
    rows: dict[str, Row] = {name: float_row(name, weight_of(module)) for name, module in linears.items()}
    stored = track(source.stored(model), "reading", source.size)
    for name, linear in stored:
        if linear is None:
            result.warnings.append(f"{name} is decoded: no linear of the model has its weight")
            continue
        if linear.experts is not None:
            result.decoded[model.get_parameter(name)] = linear.stored_bits
            rows[name] = _row(name, linear)
            continue
        kernel = _install(model, name, linear, cfg.execution)
        result.kernels |= {kernel} if kernel else set()
        if name in rows:
            rows[name] = _row(name, linear)
    result.layers = list(rows.values())
    result.warnings += [*_floats(rows), *_experts(name for name in rows if name not in linears)]
    if cfg.execution == "packed":
        result.joined = join_linears(decoder)
    result.sizes = sizes(decoder.blocks or [model], decoded=result.decoded)
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
    for kind in _kinds(floats if len(floats) < len(rows) else []):
        yield f"{kind} stays float in the checkpoint"


def _experts(names: Iterable[str]) -> Iterator[str]:
    """A warning for each kind of experts in one tensor."""
    for kind in _kinds(names):
        yield f"{kind} is decoded: it has the experts of a block in one tensor, which no packed linear replaces"


def _kinds(names: Iterable[str]) -> list[str]:
    """The kinds of linears, with `*` for numbers; a single linear has its name."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    return [members[0] if len(members) == 1 else kind for kind, members in kinds.items()]
