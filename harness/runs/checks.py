"""Checks of a configuration that need only the shape of the model, before its weights are loaded."""

from __future__ import annotations

import torch

from harness import quantization
from harness.config import RunConfig
from harness.kernels.native import library
from harness.models import Decoder, Source
from harness.nn import kvcache, positions
from harness.utils.errors import Refusal


def check(cfg: RunConfig, source: Source) -> list[str]:
    """Check lengths, method, scheme and KV cache against the shape of the model.

    Returns: warnings for the record, also that of a native library that a run on a CPU cannot use.
    Raises: ValueError, in one line, for a setting that does not fit the model.
    """
    source.check()
    skeleton = source.skeleton()
    _check_lengths(cfg, positions(source.shape, skeleton))
    quantization.check(Decoder(skeleton), cfg)
    if cfg.head is not None:
        quantization.check_head(skeleton, cfg.head, cfg.model.name)
    warnings = list(cfg.warnings)
    if cfg.kv is not None and (warning := kvcache.check(cfg.kv, source.shape, cfg.data.seq_len, cfg.model.name)):
        warnings.append(warning)
    if device_of(cfg.device).type == "cpu" and (fault := library.fault()):
        warnings.append(f"torch's kernels run instead of the native library: {fault}")
    return warnings


def device_of(name: str) -> torch.device:
    """The device of a run: `name` is the value of `device`; auto is the GPU if there is one, else the CPU.

    Raises: Refusal, in one line, if the device is unknown or not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Refusal(f"device={name} is unknown; expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise Refusal(f"device={name} is not supported; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Refusal(f"device={name} is not available: torch {torch.__version__} sees no GPU; use device=cpu")
    return device


def _check_lengths(cfg: RunConfig, limit: int | None) -> None:
    """Check that no sequence of the run is longer than `limit`, the positions of the model."""
    lengths = {"data.seq_len": cfg.data.seq_len}
    if cfg.calibrates:
        lengths["data.calibration_seq_len"] = cfg.data.calibration_seq_len
    if cfg.measure.latency:
        timed_len = cfg.measure.prompt_len + cfg.measure.warmup + cfg.measure.decode_tokens
        lengths["measure.prompt_len + warmup + decode_tokens"] = timed_len
    for key, length in lengths.items():
        if limit is not None and length > limit:
            raise Refusal(
                f"{key}={length} exceeds the {limit} positions of model={cfg.model.name}; use {limit} or less"
            )
