"""Writes a single GGUF file, which llama.cpp loads: settings, vocabulary, blocks of codes, and floats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.core import QTensor
from harness.models.exchange.gguf_blocks import blocks_of
from harness.models.exchange.gguf_layout import LAYOUTS, Field, Layout, frequency_factors, settings
from harness.models.exchange.gguf_vocabulary import Vocabulary
from harness.models.exchange.writer import float_tensors

_Stored = tuple[str, NDArray[Any]]  # the name of a type of GGUF, and rows of numbers, or of bytes


def write_gguf(file: Path, name: str, model: nn.Module, linears: Mapping[str, QTensor], tokenizer: Any) -> None:
    """Write a model called `name`, with `linears` in the place of its weights of these names.

    `tokenizer` is one of transformers; None writes a file without a vocabulary.
    Raises: ValueError if the architecture has no name for a tensor, or no type of GGUF holds a weight.
    """
    import gguf

    config: Any = model.config
    layout = LAYOUTS[config.model_type]
    names = layout.names(config.num_hidden_layers)
    tensors = {_name(layout, names, name): stored for name, stored in _tensors(layout, model, linears)}
    writer = gguf.GGUFWriter(file, layout.name)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(tensors))
    for kind, key, value in (*settings(layout, config), *_vocabulary(tokenizer, config.vocab_size)):
        getattr(writer, f"add_{kind}")(key, value)
    for tensor, (kind, data) in tensors.items():
        writer.add_tensor(tensor, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _vocabulary(tokenizer: Any, size: int) -> Iterable[Field]:
    return [("string", "tokenizer.ggml.model", "none")] if tokenizer is None else Vocabulary(tokenizer, size).fields()


def _tensors(layout: Layout, model: nn.Module, linears: Mapping[str, QTensor]) -> Iterator[tuple[str, _Stored]]:
    """Each tensor under its name in transformers."""
    config: Any = model.config
    for name, weight in linears.items():
        yield f"{name}.weight", _blocks(name, weight, layout.rows(name, weight.shape[0], config))
    for name, tensor in float_tensors(model, linears).items():
        rows = layout.rows(name.rpartition(".")[0], tensor.shape[0], config)
        ordered = tensor if rows is None else tensor[rows]
        yield name, _floats(layout.stored(name, ordered) if ordered.dim() == 1 else ordered)
    if (factors := frequency_factors(config)) is not None:
        yield "rope_freqs.weight", ("F32", factors.numpy())


def _blocks(name: str, weight: QTensor, rows: Tensor | None) -> _Stored:
    stored = blocks_of(weight)
    if stored is None:
        raise ValueError(f"no type of GGUF holds {name}, {type(weight).__name__} with {weight.shape[1]} inputs")
    kind, data = stored
    return kind, data if rows is None else data[rows.numpy()]


def _name(layout: Layout, names: Any, name: str) -> str:
    """The name of a tensor of transformers in the file, by the `names` of the layout.

    Raises: ValueError if the architecture has none for it.
    """
    stem, _, part = name.rpartition(".")
    found = stem if stem == "rope_freqs" else names.get_name(stem)
    if found is None:
        raise ValueError(f"GGUF has no name for {name} in the architecture {layout.name}; use export=native")
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
