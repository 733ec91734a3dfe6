"""Loading by transformers: every weight must come from the checkpoint, and what transformers reports is read.

transformers fills a weight that the checkpoint lacks with random numbers, and ignores tensors that it has no place for.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.models.checkpoint import DOWNLOAD, FLOATS, CheckpointError
from harness.utils.explain import cut

_SHOWN = 2  # names in a message
_NAMES = 120  # characters of the names in a warning


@dataclass(frozen=True)
class Loaded:
    """A model whose weights all come from the checkpoint, and what a user must know about the load."""

    model: nn.Module
    warnings: list[str] = field(default_factory=list)


def decoded_gguf(file: Path, config: Any = None) -> Any:
    """The model that transformers decodes from a GGUF file, in float32, without the traces of its quantization.

    `config` is that of the file if it is known; transformers takes seconds to read it.
    """
    from transformers import AutoModelForCausalLM

    from harness.models.gguf_reading import once

    options = {"gguf_file": file.name, "dtype": torch.float32, "config": copy.deepcopy(config)}
    with once():
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    # The weights are decoded, but transformers would expect codes in a saved folder, and refuses `double` and `float`.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    return model


def config_class(config: Mapping[str, Any]) -> Any:
    """The class of transformers for a config.json with the content `config`.

    Raises: CheckpointError if transformers does not know `model_type`; custom code of a checkpoint is never run.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[str(model_type)]
    if code := custom_code(config):
        detail = f"model_type={model_type} needs custom code, {code}, which is never run"
        raise CheckpointError("cannot be read", detail, "expected a model class of transformers itself")
    if model_type is None:
        raise CheckpointError(
            "cannot be read", "config.json has no model_type", "correct config.json, or download it again"
        )
    raise CheckpointError(
        "cannot be read",
        f"transformers {transformers.__version__} has no model_type={model_type}",
        "correct config.json, or install a newer transformers",
    )


def custom_code(config: Mapping[str, Any]) -> str | None:
    """The Python file of a checkpoint's own model class, which is not run; None if it has none."""
    classes = config.get("auto_map")
    if not isinstance(classes, Mapping) or not classes:
        return None
    reference = classes.get("AutoModelForCausalLM") or next(iter(classes.values()))
    return f"{str(reference).rpartition('.')[0].rpartition('--')[2]}.py"


def check_causal(shape: Any, config: Mapping[str, Any]) -> None:
    """Raises: CheckpointError if transformers has no causal language model for `shape`, the config of a model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(shape) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else type(shape).__name__
    kind = ", with an encoder" if getattr(shape, "is_encoder_decoder", False) else ""
    detail = f"it is a {name}{kind}"
    raise CheckpointError("cannot be read", detail, "expected a causal language model, which predicts the next token")


def skeleton(shape: Any) -> nn.Module:
    """The model of a transformers config without weights, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(shape), trust_remote_code=False)
    return model


def pretrained(load: Callable[..., Any], names: Iterable[str]) -> Loaded:
    """The model that `load(**options)` returns, which is transformers' `from_pretrained`.

    `names` are those of the tensors in the checkpoint.
    Raises: CheckpointError if a weight is not in the checkpoint or has another shape, or is not a float.
    """
    model, report = load(output_loading_info=True, ignore_mismatched_sizes=True)
    unused = sorted({*report["unexpected_keys"], *_ignored(model, names)})
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        more = f", and {len(mismatched) - 1} more" if len(mismatched) > 1 else ""
        detail = f"{name} is {tuple(stored)} in the file, {tuple(expected)} by config.json{more}"
        raise CheckpointError("cannot be read", detail, "correct config.json, or download the folder again")
    if missing := sorted(report["missing_keys"]):
        other = f"; it has instead: {_listed(unused)}" if unused else ""
        problem = f"lacks {len(missing)} weight{'s' if len(missing) > 1 else ''} of {type(model).__name__}"
        remedy = "expected a complete checkpoint of this class"
        if missing == [_head_weight(model)]:
            remedy = "expected the head too, or tie_word_embeddings=true in config.json"
        raise CheckpointError(problem, f"{_listed(missing)}{other}", remedy)
    if report["error_msgs"]:
        raise CheckpointError("cannot be read", str(report["error_msgs"][0]), DOWNLOAD)
    codes = [name for name, parameter in model.named_parameters() if parameter.dtype not in FLOATS]
    if codes:
        raise CheckpointError(
            "is quantized already", f"{_listed(codes)}: not floats", "expected a checkpoint of floats"
        )
    return Loaded(model, [*_unused_warning(model, unused), *_untied_warning(model)])


def _ignored(model: Any, names: Iterable[str]) -> list[str]:
    """The weights in the checkpoint that the model's class ignores without a report, such as further decoder blocks."""
    patterns = "|".join(
        f"(?:{pattern})" for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    )
    present = {name for name, _ in model.named_parameters()}
    weights = [name for name in names if name.endswith(".weight") and name not in present]
    return [name for name in weights if patterns and re.search(patterns, name)]


def _unused_warning(model: nn.Module, unused: list[str]) -> list[str]:
    if not unused:
        return []
    name = type(model).__name__
    if len(unused) == 1:
        return [f"1 tensor of the checkpoint has no place in {name} and was ignored: {unused[0]}"]
    return [f"{len(unused)} tensors of the checkpoint have no place in {name} and were ignored: {_listed(unused)}"]


def _untied_warning(model: Any) -> list[str]:
    """A warning if config.json ties the head to the embedding, but the checkpoint has a head with other values."""
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False) and model._tied_weights_keys
    head, embedding = (getattr(model, f"get_{end}_embeddings")() for end in ("output", "input"))
    weights = [getattr(module, "weight", None) for module in (head, embedding)]
    if not tied or any(weight is None for weight in weights) or weights[0] is weights[1]:
        return []
    return ["config.json has tie_word_embeddings=true, but the checkpoint has another head, which is used"]


def _head_weight(model: Any) -> str | None:
    """The name of the head's weight; None if the model has no head of this kind."""
    head = model.get_output_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is head), None)


def _listed(names: list[str]) -> str:
    """The first of several names, and how many more there are, shortened."""
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return cut(", ".join(names[:_SHOWN]), _NAMES) + more
