"""A model before its weights are loaded: its config, the fingerprint of its weights, its tokenizer, and its loading."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import Dtype, ModelConfig, folder_name
from harness.models import checkpoint, gguf, loading, prequantized, random
from harness.models.checkpoint import DOWNLOAD, reading
from harness.models.files import INCORRECT, Files, quiet
from harness.models.tokenizer import Tokenizer, byte_tokenizer, check_files, pretrained_tokenizer
from harness.utils.errors import short
from harness.utils.explain import explain


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

    @property
    def key_value(self) -> str:
        """The configuration key that names the source, and its value, as messages begin: `model.path=FOLDER`."""
        return f"model.{self.cfg.source}={getattr(self.cfg, self.cfg.source)}"

    @property
    def reference(self) -> Source:
        """The source of the float model with which this model is compared."""
        return self

    @property
    def name(self) -> str:
        """Name of the model in records, tables and messages: for a local folder the folder's name."""
        return folder_name(self.cfg.path) if self.cfg.path is not None else self.cfg.name

    @functools.cached_property
    def _files(self) -> Files:
        return Files(self.cfg, self.key_value)

    @functools.cached_property
    def shape(self) -> Any:
        """The transformers config of the model.

        Raises: ValueError if transformers cannot read it, it is no causal language model, or it is quantized already.
        """
        if self.cfg.source == "architecture":
            quiet()
            return random.shape_of(self.cfg.architecture or {})
        from transformers import AutoConfig

        with reading(self.key_value, INCORRECT):
            prequantized.check_folder(self._files.config, self._files.folder)
            checkpoint.check_merged(self._files.folder)
            loading.config_class(self._files.config)
            shape = self._files.read(AutoConfig, INCORRECT)
            loading.check_causal(shape, self._files.config)
        return shape

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the weights: the package, the id and revision on the hub, or a hash of a local folder's files.

        A seed of factors follows the package. For random weights, it is a hash of the architecture and the seed.
        """
        if self.cfg.source == "architecture":
            canonical = json.dumps([self.cfg.architecture, self.seed], sort_keys=True)
            return f"random:{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"
        if self.cfg.source == "path":
            with reading(self.key_value, "make the folder's files readable"):
                return checkpoint.fingerprint(self._files.folder)
        if self.cfg.source == "package":
            seed = self.cfg.factor_seed
            return str(self.cfg.package) + ("" if seed is None else f"+factors{seed}")
        return self._at_revision

    @property
    def _at_revision(self) -> str:
        """The id on the hub, and the revision."""
        return f"{self.cfg.id}@{self.cfg.revision}"

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model; bytes for random weights."""
        if self.cfg.source == "architecture":
            return byte_tokenizer()
        from transformers import AutoTokenizer

        remedy = "expected tokenizer.json or the files of a tokenizer class of transformers"
        with reading(self.key_value, remedy):
            tokenizer = self._files.read(AutoTokenizer, remedy)
            check_files(tokenizer, self._files.folder)
        return pretrained_tokenizer(tokenizer)

    def transformers_tokenizer(self) -> Any:
        """The tokenizer as transformers has it; None for random weights.

        Raises: ValueError if it cannot be read.
        """
        if self.cfg.source == "architecture":
            return None
        from transformers import AutoTokenizer

        with reading(self.key_value, INCORRECT):
            return self._files.read(AutoTokenizer, INCORRECT)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of tokens that the model has an embedding for; tokenizers may have fewer."""
        table = self.skeleton().get_input_embeddings()  # type: ignore[operator]
        rows = getattr(table, "num_embeddings", None)
        return int(rows or self.shape.get_text_config().vocab_size)

    def check_tokens(self, tokens: Tensor, text: str) -> None:
        """Check that the model has an embedding for all `tokens`; `text` is the key and value of their text.

        Raises: ValueError if a token is beyond the embedding.
        """
        highest = int(tokens.max())
        if highest >= self.shape.get_text_config().vocab_size and highest >= self.vocab_size:
            model = short(self.key_value, 50)
            problem = f"has token {highest}, but {model} has only {self.vocab_size} tokens"
            raise explain(text, problem, "", "use the model's own tokenizer")

    def dtype(self, key: Dtype) -> torch.dtype:
        """The torch dtype of a config value; auto is the checkpoint's dtype, or float32 if the checkpoint has none."""
        if key != "auto":
            named: torch.dtype = getattr(torch, key)
            return named
        default = getattr(self.shape, "dtype", None)
        return default if isinstance(default, torch.dtype) else torch.float32

    def skeleton(self) -> nn.Module:
        """The model without weights (on the meta device), to check a configuration against its modules."""
        config = self._files.config
        attention = next((key for key in ("_attn_implementation", "attn_implementation") if key in config), None)
        remedy = f"remove {attention} from config.json, or install its package" if attention else INCORRECT
        with reading(self.key_value, remedy):
            return loading.skeleton(self.shape)

    def check(self) -> None:
        """Check the files of the checkpoint as far as possible without loading a weight.

        Raises: ValueError if it is incomplete, damaged, quantized already, or no causal language model.
        """
        _ = self.shape
        if self.cfg.source != "architecture":
            self._files.tensors()

    def load(self, dtype: torch.dtype, device: torch.device, warn: Callable[[str], object] = str) -> nn.Module:
        """The model in eval mode on `device`, with its weights in memory (not mapped from a file).

        `warn` is called with each warning about the checkpoint, for the record.
        Raises: ValueError if it cannot be loaded, lacks a weight, or has a weight that is NaN or infinite.
        """
        drawn = self.cfg.source == "architecture"
        if drawn:
            model = random.draw(self.shape, self.seed, dtype, device, self.cfg.scored)
        else:
            model = self._pretrained(dtype, warn)
        for name, parameter in model.named_parameters():
            extremes = parameter.aminmax()  # faster than a test of each value, and NaN propagates
            if not all(map(torch.isfinite, extremes)):
                bad = int((~torch.isfinite(parameter)).sum())
                raise ValueError(
                    f"model={short(self.name, 50)}: {name} has {bad} NaN or infinite values in {dtype}; "
                    "expected finite weights, check the checkpoint or use model.dtype=float32"
                )
            parameter.data = parameter.data.to(device, copy=not drawn)
            parameter.requires_grad_(False)
        return _in_float64(model.to(device).eval(), dtype)

    def provenance(self, model: nn.Module) -> dict[str, Any]:
        """Provenance of the weights of the loaded `model`: the fields of the section `model` of the record."""
        fields: dict[str, Any] = {"name": self.name, "source": self.cfg.source, "fingerprint": self.fingerprint}
        if self.cfg.source == "package":
            converted = gguf.manifest(self._files.folder)
            fields |= {"note": gguf.note(converted), "gguf_sha256": converted["gguf_sha256"]}
        elif self.cfg.source == "id":
            fields["commit"] = getattr(model.config, "_commit_hash", None)
        elif self.cfg.source == "architecture":
            fields["note"] = "random weights: quality metrics have no meaning"
        return fields

    def _pretrained(self, dtype: torch.dtype, warn: Callable[[str], object]) -> nn.Module:
        from transformers import AutoModelForCausalLM

        self.check()
        load = functools.partial(self._files.read, AutoModelForCausalLM, DOWNLOAD, dtype=dtype)
        with reading(self.key_value, DOWNLOAD):
            loaded = loading.pretrained(load, self._files.tensors())
        self._files.tensors()  # again: the files of a hub are here only now
        for warning in loaded.warnings:
            warn(f"model={self.name}: {warning}")
        if code := loading.custom_code(self._files.config):
            warn(f"model={self.name}: its custom code, {code}, is not run; transformers' own class is used")
        return loaded.model


def _in_float64(model: Any, dtype: torch.dtype) -> nn.Module:
    """The model, whose experts run one by one in float64: torch has no grouped matmul of this dtype."""
    if dtype is torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    checked: nn.Module = model
    return checked
