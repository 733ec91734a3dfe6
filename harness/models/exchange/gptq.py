"""GPTQ checkpoints, as AutoGPTQ, GPTQModel and auto-round write them (checkpoint_format gptq and gptq_v2).

    qweight  (K bits / 32, N) int32    codes of 32 / bits inputs a word; 3-bit codes cross words
    qzeros   (G, N bits / 32) int32    zero points; version 1 stores them minus 1, modulo 2^bits
    scales   (G, N) float16
    g_idx    (K,) int32                the group of each input; with act_order they are in any order

Source: AutoGPTQ, qlinear_cuda_old.py; GPTQModel, utils/model.py, convert_gptq_v1_to_v2_format; auto-round,
inference/backend.py, GPTQ_FORMAT_NO_ZP.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from harness.core import IntQTensor, QTensor, Scheme
from harness.core.formats import InputQuantizer, PermutedQTensor
from harness.models.exchange.folder_writer import FolderWriter, Linears
from harness.models.exchange.integers import SCALES, integers, regrouped
from harness.models.exchange.reader import (
    Reader,
    StoredLinear,
    Tensors,
    bits_of,
    expect,
    unsupported,
)
from harness.models.exchange.words import WORD, stream, to_stream
from harness.models.exchange.writer import zero_points

_FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is added to stored zero points
_WIDTHS = (2, 3, 4, 8)


class GPTQ(Reader):
    """Linears with `qweight`, `qzeros`, `scales` and perhaps `g_idx`."""

    name = "gptq"
    key = "qweight"
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def read(self, name: str) -> StoredLinear:
        tensors = self.tensors(name, ("qweight", "qzeros", "scales"))
        words = expect(name, "qweight", tensors["qweight"], torch.int32, -1, -1)
        bits = self._bits(name)
        columns = _columns(name, words, tensors.get("g_idx"), bits)
        scales = expect(name, "scales", tensors["scales"], SCALES, -1, words.shape[1])
        groups, rows = scales.shape
        expect(name, "qzeros", tensors["qzeros"], torch.int32, groups, rows * bits // WORD)
        codes = stream(words.t(), bits, columns)
        zero_point = (stream(tensors["qzeros"], bits, rows).t().int() + self._offset) % (1 << bits)
        weight: Any
        if "g_idx" in tensors:
            weight = regrouped(name, codes, scales.t(), zero_point, tensors["g_idx"].long(), bits)
        else:
            weight = integers(name, codes, scales.t(), zero_point, bits)
        return StoredLinear(weight, bits_of(tensors))

    @property
    def _offset(self) -> int:
        form = str(self.section.get("checkpoint_format", "gptq"))
        if form not in _FORMATS:
            raise unsupported("checkpoint_format", form, " or ".join(_FORMATS))
        return _FORMATS[form]

    def _bits(self, name: str) -> int:
        """The width of a linear: that of the last pattern that matches its name, else `bits`."""
        bits = self.section.get("bits")
        for settings in self._own(name):
            bits = settings.get("bits", bits)
        if bits not in _WIDTHS:
            raise unsupported("bits", bits, ", ".join(map(str, _WIDTHS)))
        return int(bits)

    def _own(self, name: str) -> Iterator[dict[str, Any]]:
        """The settings of a linear itself; later ones hold.

        GPTQModel writes patterns as `dynamic`, auto-round patterns and then names as `extra_config`.
        """
        named = self.section.get("extra_config") or {}
        for pattern, settings in [*(self.section.get("dynamic") or {}).items(), *named.items()]:
            if re.match(pattern.removeprefix("+:"), name) and isinstance(settings, dict):
                yield settings
        if isinstance(named.get(name), dict):
            yield named[name]


class AutoRound(GPTQ):
    """The layout of auto-round's own packing: zero points as they are."""

    name = "auto-round"
    _offset = 0


class GPTQWriter(FolderWriter):
    """Writes what GPTQ's loaders read: version 1 where it can, float16 scales, whole words.

    Version 1 stores a zero point of 0 as the largest code. Loaders that add 1 to whole words carry it into the next
    zero point, so that such weights need version 2.
    """

    name = "gptq"

    def __init__(self, form: str = "gptq") -> None:
        """`form` is the value of `checkpoint_format`."""
        self.form = form

    def fitted(self, linears: Linears) -> GPTQWriter:
        return GPTQWriter("gptq_v2" if any(_has_zero(weight) for weight, _ in linears.values()) else "gptq")

    def check(self, scheme: Scheme) -> None:
        self.plain_integers(scheme, _WIDTHS)

    def section(self, scheme: Scheme, linears: Linears, floats: list[str]) -> dict[str, Any]:
        fmt = self.integers(scheme)
        return {
            "quant_method": "gptq",
            "checkpoint_format": self.form,
            "bits": fmt.bits,
            "group_size": fmt.group_size,
            "sym": fmt.symmetric,
            "desc_act": any(isinstance(weight, PermutedQTensor) for weight, _ in linears.values()),
            "lm_head": False,
        } | ({"dynamic": {f"-:{re.escape(name)}$": {} for name in floats}} if floats else {})

    def parts(self, weight: QTensor, inputs: InputQuantizer | None) -> Tensors:
        base, order = (weight.base, weight.order.long()) if isinstance(weight, PermutedQTensor) else (weight, None)
        if not isinstance(base, IntQTensor):
            raise self.refuse("the weight", type(base).__name__, "integer codes")
        bits, groups = base.fmt.bits, base.scale.shape[1]
        group = torch.arange(base.shape[1]) // (base.shape[1] // groups)
        codes = base.codes
        if order is not None:
            inverse = order.argsort()
            codes, group = codes[:, inverse], group[inverse]
        stored = (zero_points(base) - _FORMATS[self.form]) % (1 << bits)
        return {
            "qweight": to_stream(codes, bits).t().contiguous(),
            "qzeros": to_stream(stored.t().contiguous().to(torch.uint8), bits),
            "scales": base.scale.t().contiguous(),
            "g_idx": group.int(),
        }


def _has_zero(weight: QTensor) -> bool:
    """Whether a zero point is the code 0."""
    base = weight.base if isinstance(weight, PermutedQTensor) else weight
    return isinstance(base, IntQTensor) and not bool(zero_points(base).all())


def _columns(name: str, words: Tensor, g_idx: Tensor | None, bits: int) -> int:
    """Number of inputs that the words hold.

    Raises: CheckpointError if g_idx has another number.
    """
    columns = words.shape[0] * WORD // bits
    if g_idx is not None:
        expect(name, "g_idx", g_idx, (torch.int32, torch.int64), columns)
    return columns
