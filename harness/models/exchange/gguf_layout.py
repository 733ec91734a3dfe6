"""How llama.cpp names, orders and stores the tensors of an architecture, and the settings of a GGUF file.

    llama, mistral  of queries and keys, neighbours are rotated, where transformers rotates the two halves of a head
    gemma3          norms are stored as 1 + weight

Source: the names and keys of the package gguf; convert_hf_to_gguf.py of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Field = tuple[str, str, Any]  # the method add_* of a GGUFWriter, without its prefix; the key, and its value

_ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
_LINEAR, _LLAMA3, _PLAIN = "linear", "llama3", "default"
_LOCAL_BASE, _PATTERN = 10000.0, 6  # of Gemma 3: the rotary base of windows, and one full layer in so many


@dataclass(frozen=True)
class Layout:
    """An architecture of llama.cpp.

    name         in GGUF files
    neighbours   whether rows of queries and keys are ordered so that neighbours are rotated
    norm_offset  what is added to the weights of norms
    """

    name: str
    neighbours: bool = False
    norm_offset: float = 0.0

    def names(self, blocks: int) -> Any:
        """The names of tensors in transformers and in GGUF, `TensorNameMap` of the package gguf."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == self.name)
        return get_tensor_name_map(arch, blocks)

    def rows(self, name: str, count: int, config: Any) -> Tensor | None:
        """The order in which the `count` rows of the linear `name` are stored; None if it is that of transformers."""
        if not self.neighbours or not name.endswith(_ROTATED):
            return None
        return torch.arange(count).view(-1, 2, head_size(config) // 2).transpose(1, 2).flatten()

    def stored(self, name: str, weight: Tensor) -> Tensor:
        """A vector as the file has it, in float32."""
        offset = self.norm_offset if name.endswith("norm.weight") else 0.0
        return weight.float() + offset


LAYOUTS: Mapping[str, Layout] = {
    "llama": Layout("llama", neighbours=True),
    "mistral": Layout("llama", neighbours=True),
    "qwen2": Layout("qwen2"),
    "qwen3": Layout("qwen3"),
    "gemma3_text": Layout("gemma3", norm_offset=1.0),
}


def head_size(config: Any) -> int:
    """Number of values of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotation(config: Any) -> Mapping[str, Any]:
    """The parameters of the rotary embedding of full attention."""
    parameters: Mapping[str, Any] = config.rope_parameters
    full: Mapping[str, Any] = parameters.get("full_attention", parameters)
    return full


def problem(config: Any) -> tuple[str, Any, str] | None:
    """A setting of the model that llama.cpp computes in another way: key, value, and what it expects; None if none."""
    if config.model_type not in LAYOUTS:
        return "model_type", config.model_type, f"one of {', '.join(LAYOUTS)}"
    for key, value, held in _held(config):
        if value not in held:
            return key, value, " or ".join(map(str, held))
    return None


def _held(config: Any) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Settings whose values llama.cpp takes for granted: key, value of the model, and the values that are computed."""
    kind = rotation(config).get("rope_type", _PLAIN)
    if config.model_type != "gemma3_text":
        yield "rope_type", kind, (_PLAIN, _LINEAR, _LLAMA3)
        yield "hidden_act", config.hidden_act, ("silu",)
        return
    places = [place for place, attention in enumerate(config.layer_types) if attention == "full_attention"]
    yield "rope_type", kind, (_PLAIN,)
    yield "hidden_activation", config.hidden_activation, ("gelu_pytorch_tanh",)
    yield "query_pre_attn_scalar", config.query_pre_attn_scalar, (head_size(config),)
    yield "rope_local_base_freq", config.rope_parameters["sliding_attention"]["rope_theta"], (_LOCAL_BASE,)
    yield "layers of full attention", places, (list(range(_PATTERN - 1, config.num_hidden_layers, _PATTERN)),)


def settings(layout: Layout, config: Any) -> Iterator[Field]:
    """The fields that describe the shape of a model."""
    size, rope = head_size(config), rotation(config)
    counts = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
        "vocab_size": config.vocab_size,
    }
    if layout.name == "gemma3":
        counts["attention.sliding_window"] = config.sliding_window
    yield from (("uint32", f"{layout.name}.{key}", int(value)) for key, value in counts.items())
    yield "float32", f"{layout.name}.attention.layer_norm_rms_epsilon", float(config.rms_norm_eps)
    yield "float32", f"{layout.name}.rope.freq_base", float(rope["rope_theta"])
    if rope.get("rope_type", _PLAIN) == _LINEAR:
        yield "string", f"{layout.name}.rope.scaling.type", _LINEAR
        yield "float32", f"{layout.name}.rope.scaling.factor", float(rope["factor"])


def frequency_factors(config: Any) -> Tensor | None:
    """What rotary frequencies are divided by, (head_size / 2,) float32; None if they are not scaled one by one.

    Source: Llama 3.1, transformers, modeling_rope_utils.py, _compute_llama3_parameters.
    """
    if rotation(config).get("rope_type", _PLAIN) != _LLAMA3:
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[_LLAMA3](config, torch.device("cpu"))
    places = torch.arange(0, head_size(config), 2).double() / head_size(config)
    plain: Tensor = rotation(config)["rope_theta"] ** -places
    return (plain / scaled.double()).float()
