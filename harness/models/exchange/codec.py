"""Quantized weights, and what quantizes inputs, as a description in JSON and tensors, and back to the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from harness.config import build
from harness.core import (
    FloatActivation,
    FloatQTensor,
    FloatWeight,
    IntActivation,
    IntQTensor,
    IntWeight,
    LearnedWeight,
    LevelsQTensor,
    LevelsWeight,
    QTensor,
)
from harness.core.formats import (
    AdditiveQTensor,
    IncoherentQTensor,
    InputQuantizer,
    MixedQTensor,
    OffsetQTensor,
    OffsetWeight,
    PermutedQTensor,
    ScaledQTensor,
)
from harness.core.formats.incoherent import STAGES
from harness.core.formats.learned_weight import LearnedQTensor
from harness.core.formats.qtensor import GroupedQTensor
from harness.core.formats.trellis import Trellis
from harness.core.formats.trellis_weight import TrellisQTensor
from harness.models.exchange.inputs import calibrated
from harness.models.exchange.reader import Tensors, damaged, restored

Json = dict[str, Any]

_GROUPED: dict[str, tuple[type[GroupedQTensor], type]] = {
    "integers": (IntQTensor, IntWeight),
    "offset": (OffsetQTensor, OffsetWeight),
    "floats": (FloatQTensor, FloatWeight),
    "levels": (LevelsQTensor, LevelsWeight),
    "learned": (LearnedQTensor, LearnedWeight),
}
_AROUND: dict[str, type[MixedQTensor] | type[ScaledQTensor] | type[PermutedQTensor]] = {
    "mixed": MixedQTensor,
    "scaled": ScaledQTensor,
    "permuted": PermutedQTensor,
}
_ACTIVATIONS: dict[str, type[IntActivation] | type[FloatActivation]] = {
    "integers": IntActivation,
    "floats": FloatActivation,
}


def describe(weight: QTensor) -> Json:
    """What `rebuild` needs in addition to the buffers of a weight.

    Raises: ValueError if its class is none that can be rebuilt.
    """
    common: Json = {"shape": list(weight.shape)}
    for kind, (cls, _) in _GROUPED.items():
        if type(weight) is cls:
            return common | {"kind": kind, "format": dataclasses.asdict(weight.fmt)}
    for kind, around in _AROUND.items():
        if type(weight) is around:
            return common | {"kind": kind, "base": describe(weight.base)}
    if type(weight) is AdditiveQTensor:
        return common | {"kind": "additive", "code_bits": weight.code_bits}
    if type(weight) is IncoherentQTensor:
        return common | {
            "kind": "incoherent",
            "bits": next(bits for bits, books in STAGES.items() if books == weight.books),
        }
    if type(weight) is TrellisQTensor:
        return common | {"kind": "trellis", "trellis": dataclasses.asdict(weight.trellis)}
    raise ValueError(f"a {type(weight).__name__} cannot be saved; choose another method or save=null")


def rebuild(description: Json, tensors: Tensors) -> QTensor:
    """The weight of a description, whose buffers are `tensors`, by their names.

    Raises: CheckpointError if the description is none of `describe`.
    """
    kind, shape = description.get("kind"), description.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise damaged(f"a linear has the shape {shape}")
    rows, columns = shape
    try:
        fill = _FILLERS[str(kind)]
    except KeyError as error:
        raise damaged(f"a linear is of the kind {kind}, expected one of: {', '.join(_FILLERS)}") from error
    try:
        return fill(str(kind), description, (rows, columns), tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(f"the description of a linear does not fit: {error}") from error


def describe_inputs(inputs: InputQuantizer | None) -> Json | None:
    """What `rebuild_inputs` needs in addition to the buffers of a quantizer."""
    if inputs is None:
        return None
    kind = next(kind for kind, cls in _ACTIVATIONS.items() if type(inputs.fmt) is cls)
    return {"kind": kind, "format": dataclasses.asdict(inputs.fmt)}


def rebuild_inputs(description: Json | None, tensors: Tensors) -> InputQuantizer | None:
    """The quantizer of a description; `tensors` has its calibrated scale and zero point.

    Raises: CheckpointError if the description does not fit.
    """
    if description is None:
        return None
    try:
        fmt = build(_ACTIVATIONS[description["kind"]], description["format"], "activation")
        return InputQuantizer(fmt) if fmt.dynamic else calibrated(fmt, tensors["scale"], tensors.get("zero_point"))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise damaged(f"the description of a linear's inputs does not fit: {error}") from error


def _grouped(kind: str, description: Json, shape: tuple[int, int], tensors: Tensors) -> QTensor:
    cls, fmt = _GROUPED[kind]
    return restored(cls, shape, build(fmt, description["format"], "format"), dict.fromkeys(_OPTIONAL) | tensors)


def _around(kind: str, description: Json, shape: tuple[int, int], tensors: Tensors) -> QTensor:
    weight: Any = _AROUND[kind].__new__(_AROUND[kind])
    QTensor.__init__(weight, shape)
    prefix = "base."
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    weight.base = rebuild(description["base"], inner)
    return _filled(weight, {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)})


def _additive(kind: str, description: Json, shape: tuple[int, int], tensors: Tensors) -> QTensor:
    weight = AdditiveQTensor.__new__(AdditiveQTensor)
    QTensor.__init__(weight, shape)
    weight.code_bits = int(description["code_bits"])
    return _filled(weight, tensors)


def _incoherent(kind: str, description: Json, shape: tuple[int, int], tensors: Tensors) -> QTensor:
    weight = IncoherentQTensor.__new__(IncoherentQTensor)
    QTensor.__init__(weight, shape)
    weight.books = STAGES[description["bits"]]
    return _filled(weight, tensors)


def _trellis(kind: str, description: Json, shape: tuple[int, int], tensors: Tensors) -> QTensor:
    weight = TrellisQTensor.__new__(TrellisQTensor)
    QTensor.__init__(weight, shape)
    weight.trellis = build(Trellis, description["trellis"], "trellis")
    return _filled(weight, tensors)


def _filled(weight: QTensor, tensors: Mapping[str, Tensor]) -> QTensor:
    """The weight with its buffers."""
    for name, tensor in tensors.items():
        weight.register_buffer(name, tensor)
    return weight


_OPTIONAL = ("scale", "zero_point", "tensor_scale", "nested_scale", "nested_levels", "offset")
_FILLERS: dict[str, Callable[[str, Json, tuple[int, int], Tensors], QTensor]] = {
    **dict.fromkeys(_GROUPED, _grouped),
    **dict.fromkeys(_AROUND, _around),
    "additive": _additive,
    "incoherent": _incoherent,
    "trellis": _trellis,
}
