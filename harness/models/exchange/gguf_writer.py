"""Exports a single GGUF file: which schemes and models llama.cpp computes."""

from __future__ import annotations

from pathlib import Path

from harness.core import Scheme
from harness.models.exchange.gguf_blocks import BLOCK, INTEGERS, holds_mxfp4
from harness.models.exchange.gguf_file import write_gguf
from harness.models.exchange.gguf_layout import problem
from harness.models.exchange.gguf_vocabulary import Vocabulary
from harness.models.exchange.writer import Quantized, Writer
from harness.models.source import Source

FILE = "model.gguf"


class GGUFWriter(Writer):
    """Symmetric integers and MXFP4, in the architectures of `gguf_layout`."""

    name = "gguf"

    def check(self, scheme: Scheme) -> None:
        if scheme.activation is not None:
            raise self.refuse("scheme", scheme.name, "a scheme without activations")
        if holds_mxfp4(scheme.weight):
            return
        fmt = self.plain_integers(scheme, tuple(INTEGERS))
        if not fmt.symmetric:
            raise self.refuse("scheme.weight.symmetric", "false", "true")
        if fmt.granularity == "group" and fmt.group_size % BLOCK:
            raise self.refuse("scheme.weight.group_size", fmt.group_size, f"a multiple of {BLOCK}")

    def check_model(self, source: Source) -> None:
        config = source.shape
        if (setting := problem(config)) is not None:
            raise self.refuse(*setting)
        if (tokenizer := source.transformers_tokenizer()) is None:
            raise self.refuse("model.architecture", config.model_type, "a model with a tokenizer")
        if unknown := Vocabulary(tokenizer, config.vocab_size).problem:
            raise self.refuse("model", unknown, "a tokenizer that llama.cpp has a name for")

    def write(self, quantized: Quantized, folder: Path) -> None:
        source = quantized.source
        tokenizer = source.transformers_tokenizer()
        write_gguf(folder / FILE, source.name, quantized.model, dict(quantized.linears()), tokenizer)
