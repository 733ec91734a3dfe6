"""Writes a single GGUF file, which llama.cpp loads: settings, vocabulary, blocks of codes, and floats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.core import QTensor, Scheme
from harness.models.exchange.gguf_blocks import BLOCK, INTEGERS, blocks_of, holds_mxfp4
from harness.models.exchange.gguf_layout import LAYOUTS, Layout, frequency_factors, problem, settings
from harness.models.exchange.gguf_vocabulary import Vocabulary
from harness.models.exchange.writer import Quantized, Writer
from harness.models.source import Source

FILE = "model.gguf"

_Stored = tuple[str, NDArray[Any]]  # the name of a type of GGUF, and rows of numbers, or of bytes


class GGUFWriter(Writer):
    """Symmetric integers and MXFP4, in the architectures of `LAYOUTS`."""

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
        import gguf

        config: Any = quantized.model.config
        layout = LAYOUTS[config.model_type]
        tensors = {_name(layout, config, name): stored for name, stored in self._tensors(layout, quantized)}
        writer = gguf.GGUFWriter(folder / FILE, layout.name)
        writer.add_type("model")
        writer.add_name(quantized.source.name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_file_type(tensors))
        vocabulary = Vocabulary(quantized.source.transformers_tokenizer(), config.vocab_size)
        for kind, key, value in (*settings(layout, config), *vocabulary.fields()):
            getattr(writer, f"add_{kind}")(key, value)
        for name, (kind, data) in tensors.items():
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _tensors(self, layout: Layout, quantized: Quantized) -> Iterator[tuple[str, _Stored]]:
        """Each tensor under its name in transformers."""
        model: Any = quantized.model
        linears = dict(quantized.linears())
        for name, weight in linears.items():
            yield f"{name}.weight", self._blocks(weight, layout.rows(name, weight.shape[0], model.config))
        biases = {f"{name}.bias": getattr(model.get_submodule(name), "bias", None) for name in linears}
        floats = {name: tensor for name, tensor in biases.items() if tensor is not None}
        quantized_names = {f"{name}.weight" for name in linears}
        floats |= {name: tensor for name, tensor in model.named_parameters() if name not in quantized_names}
        for name, tensor in floats.items():
            rows = layout.rows(name.rpartition(".")[0], tensor.shape[0], model.config)
            ordered = tensor.detach().cpu() if rows is None else tensor.detach().cpu()[rows]
            yield name, _floats(layout.stored(name, ordered) if ordered.dim() == 1 else ordered)
        if (factors := frequency_factors(model.config)) is not None:
            yield "rope_freqs.weight", ("F32", factors.numpy())

    def _blocks(self, weight: QTensor, rows: Tensor | None) -> _Stored:
        blocks = blocks_of(weight)
        if blocks is None:
            shape = "x".join(map(str, weight.shape))
            raise self.refuse(f"a weight {shape}", type(weight).__name__, f"integers in blocks of {BLOCK} inputs")
        kind, data = blocks
        return kind, data if rows is None else data[rows.numpy()]


def _name(layout: Layout, config: Any, name: str) -> str:
    """The name of a tensor of transformers in the file.

    Raises: ValueError if the architecture has none for it.
    """
    stem, _, part = name.rpartition(".")
    found = stem if stem == "rope_freqs" else layout.names(config.num_hidden_layers).get_name(stem)
    if found is None:
        raise ValueError(f"export=gguf has no name for {name} in the architecture {layout.name}; use export=native")
    return f"{found}.{part}"


def _floats(tensor: Tensor) -> _Stored:
    """Floats in the smallest type that holds them; vectors in float32, as llama.cpp needs them."""
    if tensor.dim() == 1:
        return "F32", tensor.float().numpy()
    if torch.equal(tensor.bfloat16().to(tensor.dtype), tensor):
        return "BF16", tensor.bfloat16().contiguous().view(torch.uint8).numpy()
    if torch.equal(tensor.half().to(tensor.dtype), tensor):
        return "F16", tensor.half().numpy()
    return "F32", tensor.float().numpy()


def _file_type(tensors: Mapping[str, _Stored]) -> int:
    """The number of the type that most matrices have."""
    import gguf

    kinds = Counter(kind for kind, data in tensors.values() if data.ndim == 2)
    name = kinds.most_common(1)[0][0]
    types = gguf.LlamaFileType.__members__
    return int(types.get(f"MOSTLY_{name}", types.get(f"MOSTLY_{name}_MOE", types["ALL_F32"])))
