"""Quantizes one linear: checks the method's result against the contract, measures it and replaces the float linear."""

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
from harness.core import Hessian, MinMax, QTensor, Sample, Scheme, Stats
from harness.core.finite import all_finite
from harness.core.formats import InputQuantizer, compute_dtype
from harness.models import weight_of
from harness.nn import QuantLinear, replace

Quantize = Callable[[Tensor, Scheme, Stats], QTensor]


def convert(linear: QuantLinear, execution: str) -> str | None:
    """Convert an installed linear to the configured execution. Returns: its kernel; None if it is simulated."""
    if execution == "packed":
        return linear.pack().kernel
    linear.simulate()
    return None


def install(
    model: nn.Module, name: str, quantize: Quantize, scheme: Scheme, stats: Stats, notes: list[str]
) -> tuple[QuantLinear, dict[str, Any]]:
    """Quantize the linear `name` by `quantize`, a method's hook, and replace it in the model, decoded.

    `notes` collects the warnings of the method.
    Returns: the quantized linear, and its row of the record.
    Raises: ValueError that names the linear, if the method breaks the contract or cannot quantize it.
    """
    module = model.get_submodule(name)
    weight = weight_of(module).detach()
    bias = getattr(module, "bias", None)
    try:
        with recorded(name, notes):
            qtensor = _checked(quantize, weight, scheme, stats)
        row = row_of(name, weight, qtensor)
        if Hessian in stats:
            row |= {"hessian_error": hessian_error(weight, qtensor, stats[Hessian].value)}
        with recorded(name, notes):
            input_quantizer = None if qtensor.quantizes_inputs else input_quantizer_of(scheme, stats)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    linear = QuantLinear(qtensor, bias, weight.dtype, input_quantizer).to(weight.device)
    output_error = _output_error(linear, weight, bias, stats)
    replace(model, name, linear)
    return linear, row | ({} if output_error is None else {"output_error": output_error})


@contextmanager
def recorded(about: str, notes: list[str]) -> Iterator[None]:
    """Add the warnings that are raised inside to `notes`, each prefixed with the subject `about`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    notes += [f"{about}: {item.message}" for item in caught]


def float_row(name: str, weight: Tensor) -> dict[str, Any]:
    """The record's row of a linear that stays float."""
    bits = 8 * weight.element_size()
    shape = list(weight.shape)
    return {"name": name, "shape": shape, "stored_bits": bits * weight.numel(), "bits_per_weight": float(bits)}


def input_quantizer_of(scheme: Scheme, stats: Stats) -> InputQuantizer | None:
    """What quantizes the inputs of a linear by its scheme; a static format takes the range in the statistics."""
    fmt = scheme.activation
    if fmt is None:
        return None
    if fmt.dynamic:
        return InputQuantizer(fmt)
    if not stats[MinMax].absmax.any():
        warnings.warn("all its calibration inputs are 0, so its static range is unknown; its scale is 1", stacklevel=2)
    return InputQuantizer(fmt, (stats[MinMax].low, stats[MinMax].high))


def _checked(quantize: Quantize, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
    """The result of a method's `quantize`, checked against the contract."""
    version = weight._version  # torch counts in-place changes
    qtensor = quantize(weight, scheme, stats)
    if not isinstance(qtensor, QTensor) or qtensor.shape != tuple(weight.shape):
        returned = f"{type(qtensor).__name__} of shape {tuple(getattr(qtensor, 'shape', ()))}"
        raise ValueError(f"quantize returned {returned}; expected a QTensor of shape {tuple(weight.shape)}")
    if qtensor.stored_bits == 0:
        raise ValueError("quantize returned a QTensor without buffers; expected every stored tensor to be a buffer")
    if weight._version != version:
        raise ValueError("quantize changed its weight argument in place; expected it to work on a copy")
    return qtensor


def row_of(name: str, weight: Tensor, qtensor: QTensor) -> dict[str, Any]:
    """The record's row of a quantized linear; weight_error is |W' - W| / |W| in the Frobenius norm, weight_norm is |W|.

    Raises: ValueError if the decoded weight W' is not finite.
    """
    exact = weight.to(compute_dtype(weight))
    decoded = qtensor.dequantize(exact.dtype)
    if not all_finite(decoded):
        raise ValueError("the quantized weight decodes to NaN or infinite values; expected finite values")
    return {
        "name": name,
        "shape": list(qtensor.shape),
        "stored_bits": qtensor.stored_bits,
        "bits_per_weight": qtensor.bits_per_weight,
        "weight_error": relative_error(decoded, exact),
        "weight_norm": float(exact.norm()),
    }


def hessian_error(weight: Tensor, qtensor: QTensor, hessian: Tensor) -> float:
    """sqrt(tr(D H D^T) / tr(W H W^T)) of the error D = W' - W (N, K): the output error over all tokens in `hessian`.

    Frantar et al. 2022 minimise this error (arXiv 2210.17323, equation 1); here it is relative to the outputs. If no
    token was observed, the weight error is returned instead.
    """
    exact = weight.to(hessian.dtype)
    delta = qtensor.dequantize(exact.dtype) - exact
    size = _weighted(exact, hessian)
    return math.sqrt(_weighted(delta, hessian) / size) if size > 0 else relative_error(delta + exact, exact)


def _weighted(matrix: Tensor, hessian: Tensor) -> float:
    return max(0.0, float(((matrix @ hessian) * matrix).sum(dtype=torch.float64)))


def _output_error(linear: QuantLinear, weight: Tensor, bias: Tensor | None, stats: Stats) -> float | None:
    """|Y' - Y| / |Y - b| of the outputs on sampled calibration inputs; None if no inputs were sampled."""
    inputs = stats[Sample].inputs if Sample in stats else None
    if inputs is None or not len(inputs):
        return None
    inputs = inputs.to(weight)
    outputs = linear(inputs) - (0 if bias is None else bias)
    return relative_error(outputs, F.linear(inputs, weight))
