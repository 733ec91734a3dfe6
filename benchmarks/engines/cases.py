"""The exports that are loaded: a quantized form of the embedded model, its file format, and the engines for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.engines import engines
from benchmarks.engines.engines import Engine

_FLOAT32 = "scheme.weight.scale_dtype=float32"
_FULL = "scheme.activation.grid=full"
_ASYMMETRIC = ("scheme.activation.symmetric=false", "scheme.weight.symmetric=false", "scheme.weight.grid=full")
_GROUPS = ("group64_sym", "group64")
_ORDERED = ("method=gptq", "method.gptq.act_order=true", "method.gptq.static_groups=false")


@dataclass(frozen=True)
class Case:
    """One export.

    export     the value of the key `export`
    overrides  settings of the run, in addition to the model
    engines    what loads the folder
    widths     bits of linears whose name contains the key, where they differ from those of the overrides
    """

    export: str
    overrides: tuple[str, ...]
    engines: tuple[Engine, ...]
    widths: Mapping[str, int] = field(default_factory=dict)

    @property
    def settings(self) -> str:
        """What distinguishes the form, as on a command line."""
        return " ".join((*self.overrides, *(f"{part}: {bits} bits" for part, bits in self.widths.items())))


def _compressed(*overrides: str, dense: bool = True, **widths: int) -> Case:
    """`dense`: also as a model whose weights are decoded when it is loaded, which has no quantized inputs."""
    loaders = (engines.TRANSFORMERS, engines.DEQUANTIZED) if dense else (engines.TRANSFORMERS,)
    return Case("compressed-tensors", overrides, loaders, widths)


def _words(export: str, *overrides: str) -> Case:
    return Case(export, overrides, (engines.TRANSFORMERS, engines.AUTO_ROUND))


CASES = (
    _compressed("scheme=group64_sym", "bits=4"),
    _compressed("scheme=group64_sym", "bits=4", _FLOAT32),
    _compressed("scheme=group64", "bits=4", _FLOAT32),
    _compressed("scheme=group64_sym", "bits=3", _FLOAT32),
    _compressed("scheme=channel_sym", "bits=8", _FLOAT32),
    _compressed("scheme=group64_sym", "bits=4", _FLOAT32, dense=False, down_proj=8, v_proj=3),
    _compressed("scheme=w8a8_token", _FULL, _FLOAT32, dense=False),
    _compressed("scheme=w8a8_token", _FULL, *_ASYMMETRIC, _FLOAT32, dense=False),
    _compressed("scheme=w8a8_static", _FLOAT32, dense=False),
    _compressed("scheme=w_fp8_tensor"),
    _compressed("scheme=w_fp8_channel"),
    _compressed("scheme=w_fp8_block", "scheme.weight.group_size=64"),
    _compressed("scheme=fp8_channel", dense=False),
    _compressed("scheme=fp8_static", dense=False),
    _compressed("scheme=w_mxfp4"),
    _compressed("scheme=w_nvfp4"),
    *(_words("gptq", f"scheme={scheme}", f"bits={bits}") for scheme in _GROUPS for bits in (2, 3, 4, 8)),
    _words("gptq", "scheme=group64", "bits=4", *_ORDERED),
    *(_words("awq", f"scheme={scheme}", "bits=4") for scheme in _GROUPS),
)
