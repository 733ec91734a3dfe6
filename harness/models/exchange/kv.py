"""KV caches of checkpoints: keys and values in FP8 with calibrated scales, as vLLM stores them in its cache.

    compressed-tensors   kv_cache_scheme: 8 bits, float, one scale for a layer or for each of its heads
    ModelOpt             kv_cache_quant_algo FP8, or kv_cache_scheme
    <attention>.k_scale, <attention>.v_scale, or behind <attention>.k_proj and .v_proj: float32, which multiply

Source: compressed-tensors, quantization/lifecycle/initialize.py; TensorRT-Model-Optimizer, modelopt/torch/export;
vLLM, model_loader/weight_utils.py, maybe_remap_kv_scale_name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from harness.core import KVFormat, LayeredKV
from harness.core.formats import CalibratedStates
from harness.models.exchange.reader import damaged
from harness.models.tensors import TensorFiles

_NAME = "fp8_calibrated"
_KEYS = ("kv_cache_scheme", "kv_cache_quant_algo")
_SCALE = re.compile(r"\.(\d+)\..*\.([kv])_scale$")


def prescribed(section: Mapping[str, Any]) -> str | None:
    """The setting of a quantization section that prescribes a KV cache; None if there is none."""
    return next((key for key in _KEYS if section.get(key)), None)


def scale_names(names: Iterable[str]) -> list[str]:
    """Those `names` of tensors that are scales of keys or values."""
    return [name for name in names if _SCALE.search(name)]


def kv_format(section: Mapping[str, Any], files: TensorFiles, layers: int) -> KVFormat | None:
    """The format that a checkpoint of a model with so many `layers` prescribes.

    Returns: None if it prescribes none, or one without calibrated scales, or in another format than FP8.
    Raises: CheckpointError if only some of the scales are there, or one is no positive number.
    """
    names = scale_names(files.stored)
    if not names or not _is_fp8(section):
        return None
    stored: dict[tuple[int, str], CalibratedStates] = {}
    for name in names:
        match = _SCALE.search(name)
        assert match is not None
        stored[int(match[1]), match[2]] = _states(name, files)
    wanted = {(layer, kind) for layer in range(layers) for kind in "kv"}
    if stored.keys() != wanted:
        raise damaged(f"it has scales for {len(stored)} of the {len(wanted)} keys and values of its layers")
    formats = tuple(KVFormat(name=_NAME, key=stored[i, "k"], value=stored[i, "v"]) for i in range(layers))
    return LayeredKV(name=_NAME, key=formats[0].key, value=formats[0].value, layers=formats)


def _is_fp8(section: Mapping[str, Any]) -> bool:
    scheme = section.get("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        return (scheme.get("num_bits"), scheme.get("type"), bool(scheme.get("dynamic"))) == (8, "float", False)
    return str(section.get("kv_cache_quant_algo")).upper() == "FP8"


def _states(name: str, files: TensorFiles) -> CalibratedStates:
    scale = files.read(name).float().flatten()
    if not bool((scale > 0).all() and scale.isfinite().all()):
        raise damaged(f"{name} is no positive number")
    return CalibratedStates(element="e4m3", calibrated=tuple(scale.tolist()))
