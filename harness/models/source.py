"""Load or build a model and its tokenizer, from a package, a hub, a local folder or random weights."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.config.schema import Dtype, ModelConfig
from harness.data.corpora import Encode
from harness.models import gguf as embedded
from harness.utils.digests import file_sha256
from harness.utils.hub import reach

_BYTES = 256  # the tokens of the byte tokenizer
_MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".txt")


def fingerprint(cfg: ModelConfig, seed: int) -> str:
    """What fixes the weights: the package, the hub's id and revision, or a hash of a local folder's files.

    Random weights follow `seed`.
    """
    if cfg.source == "architecture":
        known = json.dumps([cfg.architecture, seed], sort_keys=True)
        return f"random:{hashlib.sha256(known.encode()).hexdigest()[:16]}"
    if cfg.source == "path":
        files = [file for file in sorted(_local(cfg).iterdir()) if file.suffix in _MODEL_FILES]
        stats = [(file, file.stat()) for file in files]
        return _hash_files(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))
    return str(cfg.package) if cfg.source == "package" else f"{cfg.id}@{cfg.revision}"


@functools.cache
def _hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    """One hash of the names and contents of files, which are read again once size or time change."""
    digest = hashlib.sha256()
    for file, _size, _time in files:
        digest.update(f"{file.name}:{file_sha256(file)};".encode())
    return digest.hexdigest()


def name_of(cfg: ModelConfig) -> str:
    """What to call a model: a local folder goes by its own name, whatever the axis says."""
    return _local(cfg).resolve().name if cfg.source == "path" else cfg.name


def provenance(cfg: ModelConfig, model: nn.Module, seed: int) -> dict[str, Any]:
    """What the record says of where the weights came from."""
    about: dict[str, Any] = {"name": name_of(cfg), "source": cfg.source, "fingerprint": fingerprint(cfg, seed)}
    if cfg.source == "package":
        gguf = embedded.manifest(embedded.folder(str(cfg.package)))
        types = ", ".join(f"{count} x {name}" for name, count in gguf["tensor_types"].items())
        about["note"] = f"float weights dequantized from {gguf['gguf']} ({types}): the float baseline was 4-bit before"
        about["gguf_sha256"] = gguf["gguf_sha256"]
    elif cfg.source == "id":
        about["commit"] = getattr(model.config, "_commit_hash", None)
    elif cfg.source == "architecture":
        about["note"] = "random weights: no quality figure means anything"
    return about


def config(cfg: ModelConfig) -> Any:
    """The transformers config of a model: its shape, without its weights.

    Raises: ValueError, in one line, if it cannot be found, reached or read.
    """
    from transformers import AutoConfig

    _quiet()
    if cfg.source == "architecture":
        try:
            shape = AutoConfig.for_model(**(cfg.architecture or {}))
        except Exception as error:  # transformers' own validators raise classes of their own
            reason = " ".join(str(error).split())
            raise ValueError(f"model.architecture={cfg.architecture} is no transformers config: {reason}") from error
        if shape.get_text_config().vocab_size < _BYTES:
            raise ValueError(
                f"model.architecture.vocab_size={shape.vocab_size} is too small; expected {_BYTES} or more"
            )
        return shape
    return _from_pretrained(AutoConfig, cfg)


def resolve_dtype(dtype: Dtype, shape: Any) -> torch.dtype:
    """The torch dtype that a config key means; auto is the checkpoint's own, float32 if it names none."""
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    found = getattr(shape, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def skeleton(shape: Any) -> nn.Module:
    """The model without weights (on the meta device), to check a configuration against its layers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(shape)
    return model


def load(cfg: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int) -> nn.Module:
    """The model in eval mode, in memory of its own (not mapped from a file), on `device`.

    Raises: ValueError if it cannot be had, or if any weight is NaN or infinite.
    """
    from transformers import AutoModelForCausalLM

    _quiet()
    model: nn.Module
    if cfg.source == "architecture":
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(seed)
            # Rows that are compared by perplexity share weights whatever their float type; large ones save the memory.
            model = AutoModelForCausalLM.from_config(config(cfg), dtype=None if cfg.scored else dtype).to(dtype)
    else:
        model = _from_pretrained(AutoModelForCausalLM, cfg, dtype=dtype)
    for name, parameter in model.named_parameters():
        if not all(map(torch.isfinite, parameter.aminmax())):  # quicker than asking of each value; NaN comes through
            bad = int((~torch.isfinite(parameter)).sum())
            raise ValueError(
                f"model={cfg.name}: {name} holds {bad} NaN or infinite values in {dtype}; "
                "expected finite weights, check the checkpoint or use model.dtype=float32"
            )
        parameter.data = parameter.data.to(device, copy=cfg.source != "architecture")
        parameter.requires_grad_(False)
    return model.to(device).eval()


def tokenizer(cfg: ModelConfig) -> Encode:
    """Text to token ids, in one call with the tokenizer's default special tokens; bytes for random weights."""
    if cfg.source == "architecture":
        return lambda text: list(text.encode())
    from transformers import AutoTokenizer

    _quiet()
    loaded = _from_pretrained(AutoTokenizer, cfg)

    def encode(text: str) -> list[int]:
        ids: list[int] = loaded(text, verbose=False)["input_ids"]
        return ids

    return encode


def _from_pretrained(auto: Any, cfg: ModelConfig, **options: Any) -> Any:
    if cfg.source == "id":
        return reach(
            lambda: auto.from_pretrained(cfg.id, revision=cfg.revision, **options),
            f"model.id={cfg.id}",
            "use model=smollm2, which is embedded and needs no hub, or a local folder as model.path=FOLDER",
        )
    place = embedded.folder(str(cfg.package)) if cfg.source == "package" else _local(cfg)
    try:
        return auto.from_pretrained(place, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model.path={place} cannot be read ({reason}); expected a transformers folder") from error


def _local(cfg: ModelConfig) -> Path:
    place = Path(str(cfg.path)).expanduser()
    if not (place / "config.json").is_file():
        raise ValueError(
            f"model.path={cfg.path} has no config.json, seen from {Path.cwd()}; expected a transformers folder"
        )
    return place


def _quiet() -> None:
    """Keep transformers' own bars and advice off the terminal; this project shows its own progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
