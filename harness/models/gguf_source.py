"""A model in a single GGUF file, as llama.cpp loads it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.models.architecture import is_linear
from harness.models.checkpoint import DOWNLOAD, reading
from harness.models.exchange.gguf import GGUF, pretrained
from harness.models.exchange.reader import StoredLinear
from harness.models.files import INCORRECT, quiet
from harness.models.gguf_reading import once
from harness.models.quantized import QuantizedSource
from harness.models.tokenizer import Tokenizer, pretrained_tokenizer
from harness.utils.digests import file_sha256
from harness.utils.errors import Refusal
from harness.utils.explain import explain


@dataclass(frozen=True)
class GGUFSource(QuantizedSource):
    """transformers decodes the file and makes config and tokenizer; the quantized rows are found by their values."""

    @functools.cached_property
    def _gguf(self) -> GGUF:
        file = Path(str(self.cfg.path)).expanduser()
        if not file.is_file():
            raise Refusal(str(explain(self.key_value, "is no file", "", "expected a GGUF file, or a folder")))
        return GGUF(file)

    @property
    def kv(self) -> None:
        """A GGUF file prescribes no format of the KV cache."""
        return None

    @functools.cached_property
    def shape(self) -> Any:
        from transformers import AutoConfig

        return self._read(AutoConfig)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        from transformers import AutoTokenizer

        return pretrained_tokenizer(self._read(AutoTokenizer))

    @functools.cached_property
    def checkpoint_fingerprint(self) -> str:
        with reading(self.key_value, "make the file readable"):
            return f"sha256:{file_sha256(self._gguf.file)}"

    @property
    def format(self) -> str:
        return self._gguf.name

    @property
    def size(self) -> int:
        return len(self._gguf.matrices)

    def check(self) -> None:
        with reading(self.key_value, DOWNLOAD):
            _ = self._gguf.matrices
        _ = self.shape

    def skeleton(self) -> nn.Module:
        from harness.models import loading

        with reading(self.key_value, INCORRECT):
            return loading.skeleton(self.shape)

    def stored(self, model: nn.Module) -> Iterator[tuple[str, StoredLinear | None]]:
        linears = {name: module for name, module in model.named_modules() if is_linear(module)}
        with reading(self.key_value, DOWNLOAD):
            yield from self._gguf.find(linears)

    def _pretrained(self, dtype: torch.dtype, warn: Callable[[str], object]) -> nn.Module:
        self.check()
        quiet()
        with reading(self.key_value, DOWNLOAD):
            return pretrained(self._gguf, self.shape).to(dtype)  # type: ignore[no-any-return]

    def _read(self, auto: Any) -> Any:
        """What the class `auto` of transformers reads from the file."""
        quiet()
        file = self._gguf.file
        with reading(self.key_value, DOWNLOAD), once():
            return auto.from_pretrained(file.parent, gguf_file=file.name)
