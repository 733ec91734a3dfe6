"""One quantized linear: what a method chose, held to the contract, measured, and put in the float one's place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.calibration import relative_error
from harness.core import Hessian, Method, MinMax, QTensor, Sample, Scheme, Stats
from harness.core.formats import InputQuantizer, compute_dtype
from harness.models import weight_of
from harness.nn import QuantLinear, replace


def install(
    model: nn.Module, name: str, step: Method, scheme: Scheme, stats: Stats, notes: list[str]
) -> tuple[QuantLinear, dict[str, Any]]:
    """Quantize the linear `name` and put it in place, decoded; returns it and its row of the record.

    `notes` takes the method's warnings.
    Raises: ValueError that names the linear, if the method breaks the contract or cannot quantize it.
    """
    module = model.get_submodule(name)
    weight = weight_of(module).detach()
    bias = getattr(module, "bias", None)
    try:
        with recorded(name, notes):
            qtensor = _checked(step.quantize, weight, scheme, stats)
        row = row_of(name, weight, qtensor)
        if Hessian in stats:
            row |= {"hessian_error": hessian_error(weight, qtensor, stats[Hessian].value)}
        rounding = None if qtensor.quantizes_inputs else _rounding(scheme, stats)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    linear = QuantLinear(qtensor, bias, weight.dtype, rounding).to(weight.device)
    off = _output_error(linear, weight, bias, stats)
    replace(model, name, linear)
    return linear, row | ({} if off is None else {"output_error": off})


@contextmanager
def recorded(about: str, notes: list[str]) -> Iterator[None]:
    """Warnings raised inside go to `notes`, each with what it is about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    notes += [f"{about}: {item.message}" for item in caught]


def float_row(name: str, weight: Tensor) -> dict[str, Any]:
    """The row of a linear that stays float."""
    bits = 8 * weight.element_size()
    shape = list(weight.shape)
    return {"name": name, "shape": shape, "stored_bits": bits * weight.numel(), "bits_per_weight": float(bits)}


def _rounding(scheme: Scheme, stats: Stats) -> InputQuantizer | None:
    fmt = scheme.activation
    if fmt is None:
        return None
    return InputQuantizer(fmt, None if fmt.dynamic else (stats[MinMax].low, stats[MinMax].high))


def _checked(quantize: Callable[..., Any], weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
    """What a method's `quantize` gives, held to the contract."""
    version = weight._version  # torch counts in-place changes
    found = quantize(weight, scheme, stats)
    if not isinstance(found, QTensor) or found.shape != tuple(weight.shape):
        what = f"{type(found).__name__} of shape {tuple(getattr(found, 'shape', ()))}"
        raise ValueError(f"quantize returned {what}; expected a QTensor of shape {tuple(weight.shape)}")
    if found.stored_bits == 0:
        raise ValueError("quantize returned a QTensor without buffers; expected all that it stores to be one")
    if weight._version != version:
        raise ValueError("quantize changed the weight that it was given; expected it to work on a copy")
    return found


def row_of(name: str, weight: Tensor, qtensor: QTensor) -> dict[str, Any]:
    """What the record says of a quantized linear; weight_error is |W' - W| / |W| in the Frobenius norm."""
    exact = weight.to(compute_dtype(weight))
    decoded = qtensor.dequantize(exact.dtype)
    if not torch.isfinite(decoded).all():
        raise ValueError("the quantized weight decodes to NaN or infinite values; expected finite ones")
    return {
        "name": name,
        "shape": list(qtensor.shape),
        "stored_bits": qtensor.stored_bits,
        "bits_per_weight": qtensor.bits_per_weight,
        "weight_error": relative_error(decoded, exact),
    }


def hessian_error(weight: Tensor, qtensor: QTensor, hessian: Tensor) -> float:
    """sqrt(tr(D H D^T) / tr(W H W^T)) of the error D = W' - W (N, K): the output error over all tokens in `hessian`.

    It is the quantity that Frantar et al. 2022 minimise (arXiv 2210.17323, equation 1), relative to the outputs. Where
    no token was seen, the weight error stands for it.
    """
    exact = weight.to(hessian.dtype)
    delta = qtensor.dequantize(exact.dtype) - exact
    size = _weighted(exact, hessian)
    return math.sqrt(_weighted(delta, hessian) / size) if size > 0 else relative_error(delta + exact, exact)


def _weighted(matrix: Tensor, hessian: Tensor) -> float:
    return max(0.0, float(((matrix @ hessian) * matrix).sum(dtype=torch.float64)))


def _output_error(linear: QuantLinear, weight: Tensor, bias: Tensor | None, stats: Stats) -> float | None:
    """|Y' - Y| / |Y - b| of the outputs on sampled calibration inputs; None where no input was seen."""
    inputs = stats[Sample].inputs if Sample in stats else None
    if inputs is None or not len(inputs):
        return None
    inputs = inputs.to(weight)
    found = linear(inputs) - (0 if bias is None else bias)
    return relative_error(found, F.linear(inputs, weight))
