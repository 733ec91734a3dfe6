"""A model before its weights are loaded: its shape, what fixes its weights, its tokenizer, and how to load it."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.config import Dtype, ModelConfig
from harness.models import gguf
from harness.utils.digests import file_sha256
from harness.utils.hub import reach

_BYTES = 256  # the tokens of the byte tokenizer
_MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".txt")


def open(cfg: ModelConfig, seed: int) -> Source:
    """The model that a configuration names; `seed` draws the random weights of an architecture.

    Nothing is read yet: each property raises ValueError, in one line, if what it needs cannot be found or read.
    """
    return Source(cfg, seed)


@dataclass(frozen=True)
class Source:
    """A model that was opened once; its properties are computed when first needed, and kept."""

    cfg: ModelConfig
    seed: int

    @functools.cached_property
    def shape(self) -> Any:
        """The transformers config of the model."""
        if self.cfg.source == "architecture":
            return _shape_of(self.cfg.architecture or {})
        from transformers import AutoConfig

        return self._from_pretrained(AutoConfig)

    @functools.cached_property
    def fingerprint(self) -> str:
        """What fixes the weights: the package, the hub's id and revision, or a hash of a local folder's files.

        Random weights follow the seed.
        """
        if self.cfg.source == "architecture":
            canonical = json.dumps([self.cfg.architecture, self.seed], sort_keys=True)
            return f"random:{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"
        if self.cfg.source == "path":
            files = [file for file in sorted(self._folder.iterdir()) if file.suffix in _MODEL_FILES]
            stats = [(file, file.stat()) for file in files]
            return _hash_files(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))
        return str(self.cfg.package) if self.cfg.source == "package" else f"{self.cfg.id}@{self.cfg.revision}"

    @functools.cached_property
    def encode(self) -> Callable[[str], list[int]]:
        """Text to token ids, in one call with the tokenizer's default special tokens; bytes for random weights."""
        if self.cfg.source == "architecture":
            return lambda text: list(text.encode())
        from transformers import AutoTokenizer

        tokenizer = self._from_pretrained(AutoTokenizer)

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
            return ids

        return encode

    @property
    def name(self) -> str:
        """What to call the model: a local folder goes by its own name, whatever the axis says."""
        return self._folder.resolve().name if self.cfg.source == "path" else self.cfg.name

    def dtype(self, key: Dtype) -> torch.dtype:
        """The torch dtype that a config key means; auto is the checkpoint's own, float32 if it names none."""
        if key != "auto":
            named: torch.dtype = getattr(torch, key)
            return named
        own = getattr(self.shape, "dtype", None)
        return own if isinstance(own, torch.dtype) else torch.float32

    def skeleton(self) -> nn.Module:
        """The model without weights (on the meta device), to check a configuration against its layers."""
        return skeleton(self.shape)

    def load(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The model in eval mode, in memory of its own (not mapped from a file), on `device`.

        Raises: ValueError if it cannot be loaded, or if a weight is NaN or infinite.
        """
        random = self.cfg.source == "architecture"
        model = self._random(dtype, device) if random else self._pretrained(dtype)
        for name, parameter in model.named_parameters():
            if not all(
                map(torch.isfinite, parameter.aminmax())
            ):  # quicker than a test of each value; NaN comes through
                bad = int((~torch.isfinite(parameter)).sum())
                raise ValueError(
                    f"model={self.cfg.name}: {name} holds {bad} NaN or infinite values in {dtype}; "
                    "expected finite weights, check the checkpoint or use model.dtype=float32"
                )
            parameter.data = parameter.data.to(device, copy=not random)
            parameter.requires_grad_(False)
        return model.to(device).eval()

    def provenance(self, model: nn.Module) -> dict[str, Any]:
        """What the record says about the weights of the loaded `model`: the fields of its section `model`."""
        about: dict[str, Any] = {"name": self.name, "source": self.cfg.source, "fingerprint": self.fingerprint}
        if self.cfg.source == "package":
            converted = gguf.manifest(self._folder)
            types = ", ".join(f"{count} x {name}" for name, count in converted["tensor_types"].items())
            about["note"] = (
                f"float weights dequantized from {converted['gguf']} ({types}): the float baseline was 4-bit before"
            )
            about["gguf_sha256"] = converted["gguf_sha256"]
        elif self.cfg.source == "id":
            about["commit"] = getattr(model.config, "_commit_hash", None)
        elif self.cfg.source == "architecture":
            about["note"] = "random weights: no quality figure means anything"
        return about

    def _random(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        from transformers import AutoModelForCausalLM

        _quiet()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(self.seed)
            # Rows that are compared by perplexity share weights whatever their float type; large ones save the memory.
            shape = copy.deepcopy(self.shape)  # a model owns its config, and a rotation changes it
            drawn = AutoModelForCausalLM.from_config(shape, dtype=None if self.cfg.scored else dtype)
            model: nn.Module = drawn.to(dtype)
        return model

    def _pretrained(self, dtype: torch.dtype) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model: nn.Module = self._from_pretrained(AutoModelForCausalLM, dtype=dtype)
        return model

    def _from_pretrained(self, auto: Any, **options: Any) -> Any:
        _quiet()
        if self.cfg.source == "id":
            return reach(
                lambda: auto.from_pretrained(self.cfg.id, revision=self.cfg.revision, **options),
                f"model.id={self.cfg.id}",
                "use model=smollm2, which is embedded and needs no hub, or a local folder as model.path=FOLDER",
            )
        try:
            return auto.from_pretrained(self._folder, **options)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"model.path={self._folder} cannot be read ({reason}); expected a transformers folder"
            ) from error

    @functools.cached_property
    def _folder(self) -> Path:
        """The folder in transformers' format: a local one, or the conversion of a package's GGUF file."""
        if self.cfg.source == "package":
            return gguf.folder(str(self.cfg.package))
        place = Path(str(self.cfg.path)).expanduser()
        if not (place / "config.json").is_file():
            raise ValueError(
                f"model.path={self.cfg.path} has no config.json, seen from {Path.cwd()}; expected a transformers folder"
            )
        return place


def skeleton(shape: Any) -> nn.Module:
    """A model of a transformers config without weights, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(shape))
    return model


def _shape_of(architecture: dict[str, Any]) -> Any:
    """The transformers config with the fields of `architecture`."""
    from transformers import AutoConfig

    _quiet()
    try:
        shape = AutoConfig.for_model(**architecture)
    except Exception as error:  # transformers' own validators raise classes of their own
        reason = " ".join(str(error).split())
        raise ValueError(f"model.architecture={architecture} is no transformers config: {reason}") from error
    if shape.get_text_config().vocab_size < _BYTES:
        raise ValueError(f"model.architecture.vocab_size={shape.vocab_size} is too small; expected {_BYTES} or more")
    return shape


@functools.cache
def _hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    """One hash of the names and contents of files, which are read again once size or time change."""
    digest = hashlib.sha256()
    for file, _size, _time in files:
        digest.update(f"{file.name}:{file_sha256(file)};".encode())
    return digest.hexdigest()


def _quiet() -> None:
    """Keep transformers' own bars and advice off the terminal; this project shows its own progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
