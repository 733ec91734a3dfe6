"""The positions of a model, from its config and its tables, are as many as its forward takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from harness import models
from harness.nn import positions

_BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_GPT = {"n_positions": 20, "n_embd": 16, "n_layer": 1, "n_head": 2}
SHAPES: dict[str, tuple[dict[str, Any], int | None]] = {
    "gpt2": (_GPT, 20),
    "ctrl": (_GPT | {"dff": 32}, 20),
    "opt": ({"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}, 20),
    "mpt": ({"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 20}, 20),
    "roberta": (_BERT | {"is_decoder": True, "pad_token_id": 1}, 18),
    "bert": (_BERT | {"is_decoder": True}, 20),
    "xlnet": ({"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}, None),
    "bloom": ({"hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
}


@pytest.mark.parametrize("family", SHAPES)
def test_the_positions_are_as_many_as_the_forward_takes(family: str) -> None:
    options, expected = SHAPES[family]
    length = {} if family in ("mpt", "xlnet", "bloom", "gpt2", "ctrl") else {"max_position_embeddings": 20}
    shape = AutoConfig.for_model(family, vocab_size=32, **options, **length)
    found = positions(shape, models.skeleton(shape))
    assert found == expected
    model = AutoModelForCausalLM.from_config(shape).eval()
    with torch.no_grad():
        model(input_ids=torch.full((1, found or 40), 5))
        if found is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, found + 1), 5))


def test_the_table_of_an_image_encoder_is_no_limit() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = _BERT | {"vision_config": vision | {"image_size": 32, "patch_size": 16}, "max_position_embeddings": 20}
    shape = AutoConfig.for_model("git", vocab_size=32, **options)
    assert positions(shape, models.skeleton(shape)) == 20
