"""A model before its weights are loaded: its config, the fingerprint of its weights, its tokenizer, and its loading."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.config import Dtype, ModelConfig
from harness.models import gguf
from harness.models.tokenizer import Tokenizer, byte_tokenizer, pretrained_tokenizer
from harness.utils.digests import file_sha256
from harness.utils.errors import Refusal
from harness.utils.hub import reach

_BYTES = 256  # vocabulary of the byte tokenizer
_MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".txt")


def open(cfg: ModelConfig, seed: int) -> Source:
    """The model of a configuration; `seed` seeds the random weights if the source is an architecture.

    Nothing is read yet. Each property raises a one-line ValueError if files that it needs are missing or unreadable.
    """
    return Source(cfg, seed)


@dataclass(frozen=True)
class Source:
    """A model that is not loaded yet; its properties are computed at first use and cached."""

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
        """Identifies the weights: the package, the id and revision on the hub, or a hash of a local folder's files.

        A seed of factors follows the package. For random weights, it is a hash of the architecture and the seed.
        """
        if self.cfg.source == "architecture":
            canonical = json.dumps([self.cfg.architecture, self.seed], sort_keys=True)
            return f"random:{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"
        if self.cfg.source == "path":
            files = [file for file in sorted(self._folder.iterdir()) if file.suffix in _MODEL_FILES]
            stats = [(file, file.stat()) for file in files]
            return _hash_files(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))
        if self.cfg.source == "package":
            seed = self.cfg.factor_seed
            return str(self.cfg.package) + ("" if seed is None else f"+factors{seed}")
        return f"{self.cfg.id}@{self.cfg.revision}"

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model; bytes for random weights."""
        if self.cfg.source == "architecture":
            return byte_tokenizer()
        from transformers import AutoTokenizer

        return pretrained_tokenizer(self._from_pretrained(AutoTokenizer))

    @property
    def name(self) -> str:
        """Name of the model in the record: for a local folder the folder's name, otherwise the name in the config."""
        return self._folder.resolve().name if self.cfg.source == "path" else self.cfg.name

    def dtype(self, key: Dtype) -> torch.dtype:
        """The torch dtype of a config value; auto is the checkpoint's dtype, or float32 if the checkpoint has none."""
        if key != "auto":
            named: torch.dtype = getattr(torch, key)
            return named
        default = getattr(self.shape, "dtype", None)
        return default if isinstance(default, torch.dtype) else torch.float32

    def skeleton(self) -> nn.Module:
        """The model without weights (on the meta device), to check a configuration against its modules."""
        return skeleton(self.shape)

    def load(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The model in eval mode on `device`, with its weights in memory (not mapped from a file).

        Raises: ValueError if it cannot be loaded, or if a weight is NaN or infinite.
        """
        random = self.cfg.source == "architecture"
        model = self._random(dtype, device) if random else self._pretrained(dtype)
        for name, parameter in model.named_parameters():
            extremes = parameter.aminmax()  # faster than a test of each value, and NaN propagates
            if not all(map(torch.isfinite, extremes)):
                bad = int((~torch.isfinite(parameter)).sum())
                raise ValueError(
                    f"model={self.cfg.name}: {name} has {bad} NaN or infinite values in {dtype}; "
                    "expected finite weights, check the checkpoint or use model.dtype=float32"
                )
            parameter.data = parameter.data.to(device, copy=not random)
            parameter.requires_grad_(False)
        return _in_float64(model.to(device).eval(), dtype)

    def provenance(self, model: nn.Module) -> dict[str, Any]:
        """Provenance of the weights of the loaded `model`: the fields of the section `model` of the record."""
        fields: dict[str, Any] = {"name": self.name, "source": self.cfg.source, "fingerprint": self.fingerprint}
        if self.cfg.source == "package":
            converted = gguf.manifest(self._folder)
            fields |= {"note": gguf.note(converted), "gguf_sha256": converted["gguf_sha256"]}
        elif self.cfg.source == "id":
            fields["commit"] = getattr(model.config, "_commit_hash", None)
        elif self.cfg.source == "architecture":
            fields["note"] = "random weights: quality metrics have no meaning"
        return fields

    def _random(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        from transformers import AutoModelForCausalLM

        _quiet()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(self.seed)
            # A scored model is drawn in the default dtype and then cast, so that all dtypes have the same weights;
            # a model that is only timed is drawn in `dtype`, to save memory.
            shape = copy.deepcopy(self.shape)  # the model keeps its config, and a rotation changes it
            initial = AutoModelForCausalLM.from_config(shape, dtype=None if self.cfg.scored else dtype)
            model: nn.Module = initial.to(dtype)
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
        """The folder in transformers' format: a local folder, or the conversion of a package's GGUF file."""
        if self.cfg.source == "package":
            return gguf.folder(str(self.cfg.package), self.cfg.factor_seed)
        folder = Path(str(self.cfg.path)).expanduser()
        if not (folder / "config.json").is_file():
            kind = ValueError if folder.is_dir() else Refusal  # a mistyped folder leaves no record
            raise kind(
                f"model.path={self.cfg.path} has no config.json; expected a transformers folder, "
                f"relative to {Path.cwd()}"
            )
        return folder


def _in_float64(model: Any, dtype: torch.dtype) -> nn.Module:
    """The model, whose experts run one by one in float64: torch has no grouped matmul of this dtype."""
    if dtype is torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    checked: nn.Module = model
    return checked


def skeleton(shape: Any) -> nn.Module:
    """The model of a transformers config without weights, on the meta device."""
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
    except Exception as error:  # transformers' validators raise their own exception classes
        reason = " ".join(str(error).split())
        raise ValueError(f"model.architecture={architecture} is not a valid transformers config: {reason}") from error
    if shape.get_text_config().vocab_size < _BYTES:
        raise ValueError(f"model.architecture.vocab_size={shape.vocab_size} is too small; expected {_BYTES} or more")
    return shape


@functools.cache
def _hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    """One hash of the names and contents of files; cached, and read again when a size or time changes."""
    digest = hashlib.sha256()
    for file, _size, _time in files:
        digest.update(f"{file.name}:{file_sha256(file)};".encode())
    return digest.hexdigest()


def _quiet() -> None:
    """Turn off progress bars and warnings of transformers; this project shows its own progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
