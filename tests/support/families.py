"""Tiny random models of many families, built from their config classes, which the harness must support unlisted."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

_SHAPE = {"vocab_size": 128, "max_position_embeddings": 64}
_LLAMA = {**_SHAPE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {**_LLAMA, "num_key_value_heads": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "gemma": {**_GROUPED, "head_dim": 8},
    "gemma2": {**_GROUPED, "head_dim": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {**_GROUPED, "head_dim": 8},
    "phi3": {**_GROUPED, "pad_token_id": 0},
    "opt": {**_SHAPE, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "gpt2": {"vocab_size": 128, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": _LLAMA,
    "bloom": {"vocab_size": 128, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def build(family: str, **options: Any) -> nn.Module:
    """A model of the family in eval mode, with the same weights at every call; `options` override its config."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family] | options))
    return model.eval()


def uneven(model: nn.Module) -> nn.Module:
    """Give the model gains and biases as after training: none is 1 or 0, and a few gains are large."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                noise = torch.rand(parameter.shape, generator=generator)
                parameter += noise - 0.5 if name.endswith("bias") else noise * 0.5
                parameter[::11] *= 1.0 if name.endswith("bias") else 4.0
            else:
                parameter *= 4  # so that attention and gates are not uniform
    return model
