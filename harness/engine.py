"""Apply a method's steps to a model: prepare, observe, transform, quantize, and put packed linears in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from harness.architecture import input_groups, linears, run_with_inputs, split_skipped, uncovered, weight_of
from harness.config import RunConfig
from harness.core.grid import compute_dtype
from harness.core.method import InputGroup, Method, overrides
from harness.core.qtensor import QTensor
from harness.core.scheme import Scheme
from harness.core.stats import MinMax, Stat, Stats
from harness.linear import InputQuantizer, QuantLinear, replace
from harness.progress import Track, silent

_CHECK_TOKENS = 64
# How far logits may move under a rewrite that keeps the function, as a relative Frobenius error.
_SAME_FUNCTION = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@dataclass
class Result:
    """What the record keeps of a quantization: a row for each linear of the blocks, and warnings."""

    layers: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, of all linears in decoder blocks, those left float included."""
        bits = sum(layer["stored_bits"] for layer in self.layers)
        return float(bits / sum(layer["shape"][0] * layer["shape"][1] for layer in self.layers))


def needs_calibration(cfg: RunConfig) -> bool:
    """Whether any step, or a static activation format, has to see calibration data."""
    activation = cfg.scheme.activation if cfg.scheme else None
    return any(step.needs for step in cfg.steps.values()) or (activation is not None and not activation.dynamic)


def check(model: nn.Module, cfg: RunConfig) -> None:
    """Check the scheme against the shapes of a model, which may be without weights.

    Raises: ValueError naming the linear that does not fit, or a `skip` pattern that matches nothing.
    """
    found = linears(model)
    if not found:
        raise ValueError(f"model={cfg.model.name} has no linear inside its decoder blocks; nothing to quantize")
    if cfg.scheme is None:
        return
    for name in split_skipped(list(found), cfg.skip)[0]:
        try:
            cfg.scheme.weight.groups(_shape(found[name]))
        except ValueError as error:
            raise ValueError(str(error).replace("; use", f" of {name}; use", 1)) from error


def quantize(model: nn.Module, cfg: RunConfig, tokens: Tensor, track: Track = silent) -> Result:
    """Run the steps of `cfg` on `model`, in place; no steps leave it as it is.

    `tokens` (B, T) int64 are the calibration sequences, or, where nothing needs them, any text of the model's:
    rewrites are proved on it.
    Raises: ValueError if a step changes the function of the float model, or cannot quantize a weight.
    """
    result = Result(warnings=[f"{name} is no linear and stays float" for name in uncovered(model)])
    found = linears(model)
    names, skipped = split_skipped(list(found), cfg.skip) if cfg.steps else ([], list(found))
    for label, step in cfg.steps.items():
        _rewrite(model, label, step, names, tokens, track)
        if overrides(step, "quantize"):
            result.layers += _quantize_all(model, cfg, step, names, tokens, track)
    result.layers += [_float_row(name, weight_of(found[name])) for name in skipped]
    return result


def observe(
    model: nn.Module, groups: list[InputGroup], needs: set[type[Stat]], tokens: Tensor, track: Track
) -> dict[str, Stats]:
    """Statistics of every linear's input over `tokens`, collected once for each input group."""
    stats: dict[str, Stats] = {}
    watchers: dict[str, Callable[[Tensor], None]] = {}
    for group in groups:
        first, module = next(iter(group.linears.items()))
        shared = Stats(needs, _shape(module)[1])
        stats.update(dict.fromkeys(group.linears, shared))
        watchers[first] = shared.update
    if needs:
        for sequence in track(tokens, "calibrate", len(tokens)):
            run_with_inputs(model, watchers, sequence[None])
    return stats


def _rewrite(model: nn.Module, label: str, step: Method, names: list[str], tokens: Tensor, track: Track) -> None:
    """The hooks that rewrite float weights, and the proof that the model still computes the same."""
    if not (overrides(step, "prepare") or overrides(step, "transform")):
        return
    before = _logits(model, tokens)
    step.prepare(model)
    if overrides(step, "transform"):
        groups = input_groups(model, names, tokens[:1])
        stats = observe(model, groups, set(step.needs), tokens, track)
        for group in track(groups, f"{label}: transform", len(groups)):
            step.transform(group, stats[next(iter(group.linears))])
    after = _logits(model, tokens)
    moved = float((after - before).norm() / before.norm())
    limit = _SAME_FUNCTION[next(model.parameters()).dtype]
    if not moved <= limit:
        raise ValueError(
            f"method.{label} changed the float model's function: logits moved by {moved:.2g} relative; "
            f"expected at most {limit:g}, prepare and transform must keep it"
        )


def _quantize_all(
    model: nn.Module, cfg: RunConfig, step: Method, names: list[str], tokens: Tensor, track: Track
) -> list[dict[str, Any]]:
    """Quantize each named linear and put a QuantLinear in its place; returns their rows."""
    assert cfg.scheme is not None
    activation = cfg.scheme.activation
    static = activation is not None and not activation.dynamic
    needs = set(step.needs) | ({MinMax} if static else set())
    groups = input_groups(model, names, tokens[:1]) if needs else []
    stats = observe(model, groups, needs, tokens, track)
    rows = []
    for name in track(names, "quantize", len(names)):
        module, seen = model.get_submodule(name), stats.get(name, Stats())
        weight = weight_of(module).detach()
        try:
            qtensor = _checked(step.quantize, weight, cfg.scheme, seen)
            rows.append(_row(name, weight, qtensor))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        quantizer = None
        if activation is not None:
            quantizer = InputQuantizer(activation, (seen[MinMax].low, seen[MinMax].high) if static else None)
        linear = QuantLinear(qtensor, getattr(module, "bias", None), weight.dtype, cfg.execution, quantizer)
        replace(model, name, linear.to(weight.device))
    return rows


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


def _row(name: str, weight: Tensor, qtensor: QTensor) -> dict[str, Any]:
    """What the record says of a quantized linear; weight_error is |W' - W| / |W| in the Frobenius norm."""
    exact = weight.to(compute_dtype(weight))
    decoded = qtensor.dequantize(exact.dtype)
    if not torch.isfinite(decoded).all():
        raise ValueError("the quantized weight decodes to NaN or infinite values; expected finite ones")
    error = (decoded - exact).norm() / exact.norm().clamp(min=torch.finfo(exact.dtype).tiny)
    return {
        "name": name,
        "shape": list(qtensor.shape),
        "stored_bits": qtensor.stored_bits,
        "bits_per_weight": qtensor.bits_per_weight,
        "weight_error": float(error),
    }


def _float_row(name: str, weight: Tensor) -> dict[str, Any]:
    bits = 8 * weight.element_size()
    shape = list(weight.shape)
    return {"name": name, "shape": shape, "stored_bits": bits * weight.numel(), "bits_per_weight": float(bits)}


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = weight_of(module).shape
    return rows, columns


@torch.inference_mode()
def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=tokens[:1, :_CHECK_TOKENS].to(device), use_cache=False).logits
    return logits.double()
