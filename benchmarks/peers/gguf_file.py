"""A GGUF file of the weights of a float model of the Llama family; it has no vocabulary, only the number of tokens.

Sources: the names and keys of the gguf package; the order of the rows of queries and keys, of which llama.cpp rotates
neighbours where transformers rotates halves, convert_hf_to_gguf.py of llama.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(model: nn.Module, file: Path) -> Path:
    """Write the weights, matrices in bfloat16 and norms in float32. Returns: the file."""
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            _add(writer, _name(name), _ordered(name, weight, config.head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _name(name: str) -> str:
    """The name of a weight in GGUF."""
    whole = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in whole:
        return f"{whole[name]}.weight"
    _, _, block, rest = name.split(".", 3)
    return f"blk.{block}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _ordered(name: str, weight: Tensor, head_dim: int) -> Tensor:
    """The weight (N, K); of queries and keys, the two halves of each head's rows alternate."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _add(writer: Any, name: str, weight: Tensor) -> None:
    import gguf

    if weight.dim() == 1:
        writer.add_tensor(name, weight.float().numpy())
    else:
        words = weight.bfloat16().contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, words, raw_dtype=gguf.GGMLQuantizationType.BF16)
