"""The output head in a format of its own: methods quantize the linears in decoder blocks and leave the head float.

In a small model the head is the largest matrix, and it is read at every token. Its weight is rounded to nearest in the
format of Q8_0 (llama.cpp), with the number of bits of the configuration. If head and embedding share a weight, the
embedding keeps it, and both are stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from harness.core import IntWeight, Method, Scheme, Stats
from harness.models import linears_of, weight_of
from harness.nn import DenseLinear, replace
from harness.quantization.install import convert, install
from harness.utils.errors import Refusal

_GROUP = 32


def check_head(model: nn.Module, bits: int, name: str) -> None:
    """Check that the head of `model`, which may be a skeleton, can be quantized; `name` is shown for the model.

    Raises: ValueError, in one line, if it has no head that is a linear, or its inputs are not whole groups.
    """
    head = _head(model)
    if head is None:
        raise Refusal(f"head={bits}: model={name} has no output head that is a linear; use head=null")
    columns = weight_of(model.get_submodule(head)).shape[1]
    if columns % _GROUP:
        raise Refusal(f"head={bits}: the {columns} inputs of {head} are not whole groups of {_GROUP}; use head=null")


@torch.no_grad()
def quantize_head(model: nn.Module, bits: int, execution: str, notes: list[str]) -> tuple[dict[str, Any], str | None]:
    """Replace the head of `model`, which `check_head` has accepted, by a QuantLinear in the form of `execution`.

    Returns: its row of the record, and the name of the kernel that runs it; None if it is simulated.
    Raises: ValueError that names the head, if its weight cannot be quantized.
    """
    name = _head(model)
    assert name is not None
    fmt = IntWeight(bits=bits, symmetric=True, grid="narrow", granularity="group", group_size=_GROUP)
    linear, row = install(model, name, Method().quantize, Scheme(name="head", weight=fmt), Stats(), notes)
    return row, convert(linear, execution)


def pack_head(model: nn.Module) -> str | None:
    """Let a native kernel run the float head of a packed model. Returns: its name; None if torch runs it as before."""
    name = _head(model)
    if name is None or not DenseLinear.supports(model.get_submodule(name)):
        return None
    dense = DenseLinear.of(model.get_submodule(name))  # type: ignore[arg-type]  # supports() has checked it
    replace(model, name, dense)
    return dense.kernel


def _head(model: nn.Module) -> str | None:
    """The name of the linear that computes the logits; None if the model has none."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next((name for name, module in linears_of(model).items() if module is head), None)
