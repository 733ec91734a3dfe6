"""Models with random weights, of a shape that the configuration gives as fields of a transformers config."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

_BYTES = 256  # vocabulary of the byte tokenizer


def shape_of(architecture: dict[str, Any]) -> Any:
    """The transformers config with the fields of `architecture`.

    Raises: ValueError if it is not valid, or its vocabulary is smaller than that of the byte tokenizer.
    """
    from transformers import AutoConfig

    try:
        shape = AutoConfig.for_model(**architecture)
    except Exception as error:  # transformers' validators raise their own exception classes
        reason = " ".join(str(error).split())
        raise ValueError(f"model.architecture={architecture} is not a valid transformers config: {reason}") from error
    if shape.get_text_config().vocab_size < _BYTES:
        raise ValueError(f"model.architecture.vocab_size={shape.vocab_size} is too small; expected {_BYTES} or more")
    return shape


def draw(shape: Any, seed: int, dtype: torch.dtype, device: torch.device, scored: bool) -> nn.Module:
    """The model of a transformers config with the random weights of `seed`, in `dtype` on `device`.

    A scored model is drawn in the default dtype and then cast, so that all dtypes have the same weights; a model that
    is only timed is drawn in `dtype`, to save memory.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        # The model keeps its config, and a rotation changes it: hence the copy.
        initial = AutoModelForCausalLM.from_config(copy.deepcopy(shape), dtype=None if scored else dtype)
        model: nn.Module = initial.to(dtype)
    return model
