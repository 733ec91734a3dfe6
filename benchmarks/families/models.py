"""Tiny random models of every family in transformers, saved as folders with a tokenizer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

SHAPES = Path(__file__).parent / "shapes.yaml"
_INITIAL = 0.05  # standard deviation below which a matrix still has the values of transformers' initialization


def families() -> list[str]:
    """All families of causal language models in transformers that are not left out, in alphabetical order."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(left_out()))


def left_out() -> dict[str, str]:
    """Families that are not built, each with the reason."""
    reasons: dict[str, str] = _shapes()["left_out"]
    return reasons


def save(family: str, folder: Path) -> None:
    """Save the tiny model of `family` and a byte-level tokenizer into `folder`.

    Raises: any exception of transformers if the shape does not fit the family.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**shape(family)))
    liven(model)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def shape(family: str) -> dict[str, Any]:
    """The fields of the family's config: the generic ones that its class has, and its own."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    special: dict[str, Any] = dict(_shapes()["families"].get(family, {}))
    if "text" in special:
        return {"text_config": shape(special.pop("text")), **special}
    known = CONFIG_MAPPING[family]().to_dict()
    return {key: value for key, value in _shapes()["generic"].items() if key in known} | special


@torch.no_grad()
def liven(model: nn.Module) -> None:
    """Replace the values of the initialization by values as after training, so that every block moves the logits.

    Matrices get the standard deviation 1 / sqrt(K), constant gains get factors around 1 with a few large ones, and
    zero biases get small values. Parameters with a special initialization, such as decays, are unchanged.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() >= 2 and 0 < float(parameter.std()) < _INITIAL:
            parameter.mul_(float(parameter.shape[-1] ** -0.5 / parameter.std()))
        elif parameter.numel() > 1 and bool((parameter == 1).all()):
            parameter.copy_(_noise(parameter, generator).mul(0.4).exp())
        elif parameter.numel() > 1 and bool((parameter == 0).all()):
            parameter.copy_(_noise(parameter, generator).mul(0.1))


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)


@functools.cache
def _shapes() -> dict[str, Any]:
    shapes: dict[str, Any] = yaml.safe_load(SHAPES.read_text())
    return shapes


def _tokenizer() -> Any:
    """A tokenizer of bytes: 256 tokens after the four special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={character: i + 4 for i, character in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)
