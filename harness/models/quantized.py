"""A model that another program quantized: a folder in the format of transformers with codes in the place of weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import ModelConfig
from harness.core import KVFormat
from harness.models import checkpoint, loading
from harness.models.architecture import experts_of, is_linear, is_transposed, weight_of
from harness.models.checkpoint import DOWNLOAD, CheckpointError, reading
from harness.models.exchange.detect import SECTIONS, reader_of
from harness.models.exchange.kv import kv_format, prescribed, scale_names
from harness.models.exchange.reader import Reader, StoredLinear
from harness.models.files import INCORRECT
from harness.models.source import Source
from harness.utils.explain import explain


def open_quantized(cfg: ModelConfig, seed: int) -> QuantizedSource:
    """The quantized model of a configuration, and its float model if `base` names it; nothing is read yet.

    Raises: ValueError if the model is no folder, no GGUF file and no model of a hub.
    """
    if cfg.source == "path" and str(cfg.path).endswith(".gguf"):
        from harness.models.gguf_source import GGUFSource

        return GGUFSource(cfg, seed)
    if cfg.source not in ("path", "id"):
        subject = f"model.{cfg.source}={getattr(cfg, cfg.source)}"
        raise explain(subject, "is no quantized model", "", "use model.path=FOLDER, or model.id=OWNER/NAME of a hub")
    return QuantizedSource(cfg, seed)


@dataclass(frozen=True)
class QuantizedSource(Source):
    """`load` gives the model with decoded weights, `stored` the linears that take their place."""

    @functools.cached_property
    def base(self) -> Source | None:
        """The float model that was quantized; None if the configuration does not name it."""
        return None if self.cfg.base is None else Source(self.cfg.base, self.seed)

    @property
    def reference(self) -> Source:
        """The float model; without one, this model with decoded weights."""
        return self.base or self

    @functools.cached_property
    def reader(self) -> Reader:
        """What reads the quantized linears.

        Raises: ValueError if the model is not quantized, or in a format without a reader.
        """
        with reading(self.key_value, INCORRECT):
            return reader_of(self._files.config, self._files.complete(), self._shapes)

    @functools.cached_property
    def kv(self) -> KVFormat | None:
        """The format of the KV cache that the checkpoint prescribes; None if it prescribes none that is known."""
        with reading(self.key_value, DOWNLOAD):
            layers = int(self.shape.get_text_config().num_hidden_layers)
            return kv_format(self.reader.section, self.reader.files, layers)

    @functools.cached_property
    def shape(self) -> Any:
        from transformers import AutoConfig

        with reading(self.key_value, INCORRECT):
            checkpoint.check_merged(self._files.folder)
            loading.config_class(self._files.config)
            shape = self._files.read(AutoConfig, INCORRECT)
            loading.check_causal(shape, self._files.config)
        for part in (shape, shape.get_text_config()):
            for section in (section for section in SECTIONS if hasattr(part, section)):
                delattr(part, section)
        return shape

    @functools.cached_property
    def fingerprint(self) -> str:
        own = self.checkpoint_fingerprint
        return own if self.base is None else f"{own} of {self.base.fingerprint}"

    @functools.cached_property
    def checkpoint_fingerprint(self) -> str:
        """A hash of the files of the quantized model; on a hub its id and revision."""
        if self.cfg.source == "id":
            return self._at_revision
        with reading(self.key_value, "make the folder's files readable"):
            return checkpoint.fingerprint(self._files.folder)

    def check(self) -> None:
        _ = self.shape
        with reading(self.key_value, DOWNLOAD):
            if not self.reader.linears:
                detail = f"no tensor is called {self.reader.tensor('<linear>', self.reader.key)}"
                raise CheckpointError(f"is no {self.reader.name} checkpoint", detail, DOWNLOAD)

    def stored(self, model: nn.Module) -> Iterator[tuple[str, StoredLinear | None]]:
        """The name in `model`, which `load` returned, of each quantized linear, and the linear.

        That of experts in one tensor is the name of a parameter. A linear whose decoded weight is that of no linear of
        the model, such as a part of fused experts, is None under its name in the file.
        Raises: ValueError if a linear cannot be read.
        """
        for name in self.reader.linears:
            with reading(self.key_value, DOWNLOAD):
                linear = self.reader.read(name)
            found = _place(model, name, linear)
            yield (name, None) if found is None else (found, linear)

    @property
    def format(self) -> str:
        """The file format."""
        return self.reader.name

    @property
    def size(self) -> int:
        """Number of quantized matrices in the file, for the progress."""
        return len(self.reader.linears)

    def provenance(self, model: nn.Module) -> dict[str, Any]:
        own = super().provenance(model) | {"format": self.format, "checkpoint": self.checkpoint_fingerprint}
        if self.cfg.source == "id":  # a snapshot's folder is called by its commit, which the loaded model does not know
            own["commit"] = self._files.folder.name
        return own if self.base is None else own | {"name": self.base.name, "fingerprint": self.base.fingerprint}

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """N and K of each linear of the model."""
        linears = {name: module for name, module in self.skeleton().named_modules() if is_linear(module)}
        return {name: (weight_of(module).shape[0], weight_of(module).shape[1]) for name, module in linears.items()}

    def _pretrained(self, dtype: torch.dtype, warn: Callable[[str], object]) -> nn.Module:
        self.check()
        skeleton: Any = self.skeleton()
        with reading(self.key_value, DOWNLOAD):
            state = dict(self._state(dtype, dict(skeleton.named_modules())))
            options = {"config": copy.deepcopy(self.shape), "state_dict": state, "dtype": dtype}
            loaded = loading.pretrained(functools.partial(type(skeleton).from_pretrained, None, **options), list(state))
        for warning in (*loaded.warnings, *self.reader.notes, *self._kv_warning()):
            warn(f"model={self.name}: {warning}")
        return loaded.model

    def _kv_warning(self) -> list[str]:
        key = prescribed(self.reader.section)
        if key is None or self.kv is not None:
            return []
        return [f"its {key} is not applied: expected FP8 with calibrated scales; use the axis kv"]

    def _state(self, dtype: torch.dtype, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a float checkpoint of the same model: quantized linears decoded to `dtype`.

        `modules` are those of the model without weights; they say which weights are stored as (K, N).
        """
        for name in self.reader.linears:
            yield _parameter(name, self.reader.read(name), dtype, modules)
        scales = scale_names(self.reader.floats) if self.kv else []
        for name in (name for name in self.reader.floats if name not in scales):
            yield self.reader.parameter(name), self.reader.files.read(name)


def _parameter(
    name: str, linear: StoredLinear, dtype: torch.dtype, modules: Mapping[str, nn.Module]
) -> tuple[str, Tensor]:
    """The name and the values of the float parameter that the linear `name` of a file takes the place of."""
    weight, owner, parameter = linear.weight.dequantize(dtype), name, f"{name}.weight"
    if linear.experts is not None:
        weight, owner, parameter = weight.unflatten(0, (linear.experts, -1)), name.rpartition(".")[0], name
    turned = owner in modules and is_transposed(modules[owner])
    return parameter, weight.mT.contiguous() if turned else weight


def _place(model: nn.Module, name: str, linear: StoredLinear) -> str | None:
    """The name of the linear, or parameter of experts, in `model` with the decoded weight of `name` of a file."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = dict(model.named_modules())
    for place in (name, prefix + name, name.removeprefix(prefix)):
        weight = _weight(modules, place, linear)
        if weight is None or weight.shape != linear.weight.shape:
            continue
        if torch.equal(weight, linear.weight.dequantize(weight.dtype).to(weight.device)):
            return place
    return None


def _weight(modules: Mapping[str, nn.Module], place: str, linear: StoredLinear) -> Tensor | None:
    """The weight (N, K) of the linear called `place`, or (E N, K) of experts; None if there is none."""
    if linear.experts is not None:
        parent, _, key = place.rpartition(".")
        return experts_of(modules[parent], key) if parent in modules else None
    return weight_of(modules[place]) if place in modules and is_linear(modules[place]) else None
