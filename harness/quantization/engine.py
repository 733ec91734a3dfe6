"""Applies the steps of a method to a model, each in one pass over the blocks.

The steps of a composite run one after another. A step that only rewrites works on the float model and keeps its
function. The step that quantizes observes the inputs that the quantized blocks before produce
(`engine.propagate=quantized`, as GPTQ's authors do), or those of the float model (`float`, as AWQ's authors do).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.calibration import PROBE_TOKENS, SAME_TURNED
from harness.config import RunConfig
from harness.core import Method, Residual, Scheme, chooses, overrides
from harness.core.formats import InputQuantizer
from harness.core.rotated import Rotated
from harness.models import Decoder, logits, matching, split_skipped, weight_of
from harness.quantization.install import float_row, recorded
from harness.quantization.joining import join_linears
from harness.quantization.passes import Pass
from harness.quantization.residual_stream import discover, untied
from harness.quantization.result import Result, sizes
from harness.quantization.rotation import train_rotation
from harness.quantization.same_function import same_function
from harness.utils.disk_cache import DiskCache
from harness.utils.explain import fitted
from harness.utils.progress import Track, silent

_NO_CACHE = DiskCache(Path(), 0)


def check(decoder: Decoder, cfg: RunConfig) -> None:
    """Check scheme and method against each other and against the shapes of a model; the model needs no weights.

    Raises: ValueError that names the linear that does not fit, or the `skip` pattern that matches no linear.
    """
    if cfg.scheme is None:
        return
    try:
        decoder.require()
    except ValueError as error:
        raise ValueError(f"method={'+'.join(cfg.steps)}: {error}") from error
    linears = decoder.linears()
    if not linears:
        raise ValueError(f"model={cfg.model.name} has no linear inside its decoder blocks; use method=none")
    _check_schemes(cfg, cfg.scheme)
    matching(list(linears), cfg.analysis.outliers, "analysis.outliers")
    names = split_skipped(list(linears), cfg.skip, decoder.uncovered())[0]
    fmt = cfg.scheme.weight
    if fmt is None or not decoder.probed:  # without a probe, some may be no linears of the decoder
        return
    for name in names:
        rows, columns = weight_of(linears[name]).shape
        try:
            fmt.groups((rows, columns))
        except ValueError as error:
            raise ValueError(str(error).replace("; use", f" of {name}; use", 1)) from error


def _check_schemes(cfg: RunConfig, scheme: Scheme) -> None:
    """Check that all steps serve the scheme, in all widths that the run may choose."""
    for label, step in cfg.steps.items():
        try:
            for each in map(scheme.at, cfg.mixed.widths) if cfg.mixes else [scheme]:
                step.check(each)
                if step.distillation and not chooses(cfg.steps[str(cfg.quantizing)]):
                    _ = each.format  # the step takes any scheme, but rounding does not
        except ValueError as error:
            raise ValueError(f"method.{label}: {error}") from error


@torch.no_grad()
def quantize(
    decoder: Decoder,
    cfg: RunConfig,
    tokens: Tensor,
    track: Track = silent,
    cache: DiskCache = _NO_CACHE,
    widths: Mapping[str, int] | None = None,
) -> Result:
    """Apply the steps of `cfg` to the decoder's model, in place; without steps it stays unchanged.

    `tokens` (B, T) int64 are the calibration sequences; a run that needs no calibration may pass any tokens of the
    model, because rewrites are proved on them. `widths` are the bits of linears that differ from the scheme's, by
    name in the float model.
    Raises: ValueError if the configuration does not fit the model, a step changes the function of the float model,
        or cannot quantize a weight.
    """
    if cfg.steps:
        check(decoder, cfg)
    result = Result(warnings=decoder.notes() if cfg.steps else [])
    linears = decoder.linears()
    names, skipped = split_skipped(list(linears), cfg.skip, decoder.uncovered()) if cfg.steps else ([], list(linears))
    twins = _twins(linears)
    rescaled: dict[str, str] = {}
    schemes = {name: cfg.scheme.at(bits) for name, bits in (widths or {}).items()} if cfg.scheme else {}
    result.renamed = dict(zip(names, names, strict=True))
    for label, step in cfg.steps.items():
        renamed: dict[str, str] = {}
        residual = None
        if overrides(step, "prepare"):
            renamed = _prepare(decoder, label, step, names, tokens, result.warnings)
        if overrides(step, "rotate"):
            residual = _rotate(decoder, label, step, tokens, result.warnings)
            renamed |= residual.renamed
        if renamed:
            linears = decoder.linears()
            names, skipped = ([renamed.get(name, name) for name in listed] for listed in (names, skipped))
            rescaled = {renamed.get(name, name): producers for name, producers in rescaled.items()}
            schemes = {renamed.get(name, name): scheme for name, scheme in schemes.items()}
            result.renamed = {old: renamed.get(name, name) for old, name in result.renamed.items()}
        if residual and step.rotation and cfg.scheme and cfg.scheme.activation:
            quantizers = dict.fromkeys(names, InputQuantizer(cfg.scheme.activation))
            result.rotated = train_rotation(decoder, residual, tokens, quantizers, step.rotation, track)
        Pass(decoder, cfg, label, names, result, rescaled, schemes).run(tokens, track, cache)
    for row in result.layers:
        row |= {"rescaled_by": rescaled[row["name"]]} if row["name"] in rescaled else {}
    result.layers += [float_row(name, weight_of(linears[name])) for name in skipped]
    copies = {decoder.model.get_submodule(result.renamed.get(name, name)) for name in twins}
    if cfg.execution == "packed":
        result.joined = join_linears(decoder)
    result.sizes = sizes(decoder.blocks or [decoder.model], copies)
    return result


def _twins(linears: Mapping[str, nn.Module]) -> list[str]:
    """Names of linears whose weight is that of an earlier linear: each gets its own codes, but the weight is one."""
    owners: dict[int, str] = {}
    return [name for name, module in linears.items() if owners.setdefault(id(module.weight), name) != name]


def _prepare(
    decoder: Decoder, label: str, step: Method, names: Sequence[str], tokens: Tensor, notes: list[str]
) -> dict[str, str]:
    """Let a step rewrite the model, which has the linears `names`.

    Returns: the linears that were renamed, old name -> new name.
    """
    model, probe = decoder.model, tokens[:1, :PROBE_TOKENS]
    before = logits(model, probe)
    with recorded(f"method.{label}", notes):
        step.prepare(model, {name: weight_of(model.get_submodule(name)).detach() for name in names})
    same_function(label, before, logits(model, probe), "the logits")
    return {name: f"{name}.{Rotated.INNER}" for name in names if isinstance(model.get_submodule(name), Rotated)}


def _rotate(decoder: Decoder, label: str, step: Method, tokens: Tensor, notes: list[str]) -> Residual:
    """Let a step rotate the residual stream.

    Returns: the stream, with the linears that were renamed.
    """
    model, probe = decoder.model, tokens[:1, :PROBE_TOKENS]
    before = logits(model, probe)
    try:
        residual = discover(decoder, probe)
    except ValueError as error:
        start = f"method.{label}: the model cannot be rotated: "
        raise ValueError(fitted(start, str(error), "; use a method without rotation, such as gptq")) from error
    with recorded(f"method.{label}", notes):
        step.rotate(residual)
    untied(model)
    same_function(label, before, logits(model, probe), "the logits", SAME_TURNED)
    return residual
