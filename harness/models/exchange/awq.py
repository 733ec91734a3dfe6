"""AWQ checkpoints, as AutoAWQ and llm-awq write them, in the layout of their `gemm` kernel.

    qweight  (K, N / 8) int32    eight codes a word, of the columns 0, 2, 4, 6, 1, 3, 5, 7
    qzeros   (G, N / 8) int32    zero points, likewise
    scales   (G, N) float16

Source: AutoAWQ, awq/modules/linear/gemm.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.core import IntQTensor, QTensor, Scheme
from harness.core.formats import InputQuantizer
from harness.models.exchange.folder_writer import FolderWriter, Linears
from harness.models.exchange.integers import SCALES, integers
from harness.models.exchange.reader import Reader, StoredLinear, Tensors, bits_of, expect, unsupported
from harness.models.exchange.words import stream, to_stream
from harness.models.exchange.writer import zero_points

_BITS, _ACROSS = 4, 8  # codes of a word
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AWQ(Reader):
    """Linears with `qweight`, `qzeros` and `scales` in rows of inputs."""

    name = "awq"
    key = "qweight"
    parts = ("qweight", "qzeros", "scales")

    def read(self, name: str) -> StoredLinear:
        version = str(self.section.get("version", "gemm")).lower()
        if version != "gemm":
            raise unsupported("version", version, "gemm")
        if (bits := self.section.get("bits", self.section.get("w_bit"))) != _BITS:
            raise unsupported("bits", bits, str(_BITS))
        tensors = self.tensors(name, self.parts)
        words = expect(name, "qweight", tensors["qweight"], torch.int32, -1, -1)
        scales = expect(name, "scales", tensors["scales"], SCALES, -1, words.shape[1] * _ACROSS)
        zeros = expect(name, "qzeros", tensors["qzeros"], torch.int32, len(scales), words.shape[1])
        weight = integers(name, _columns(words), scales.t(), _columns(zeros), _BITS)
        return StoredLinear(weight, bits_of(tensors))


class AWQWriter(FolderWriter):
    """Writes the layout of the `gemm` kernel."""

    name = "awq"

    def check(self, scheme: Scheme) -> None:
        self.plain_integers(scheme, (_BITS,))

    def section(self, scheme: Scheme, linears: Linears, floats: list[str]) -> dict[str, Any]:
        fmt = self.integers(scheme)
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": _BITS,
            "group_size": fmt.group_size,
            "zero_point": not fmt.symmetric,
            "sym": fmt.symmetric,  # auto-round reads this in the place of zero_point
            "modules_to_not_convert": floats or None,
        }

    def parts(self, weight: QTensor, inputs: InputQuantizer | None) -> Tensors:
        if not isinstance(weight, IntQTensor):
            raise self.refuse("the weight", type(weight).__name__, "integer codes")
        if weight.shape[0] % _ACROSS:
            raise self.refuse("the weight's outputs", weight.shape[0], f"a multiple of {_ACROSS}")
        return {
            "qweight": _words(weight.codes),
            "qzeros": _words(zero_points(weight)),
            "scales": weight.scale.t().contiguous(),
        }


def _words(codes: Tensor) -> Tensor:
    """The inverse of `_columns`."""
    across = codes.t().reshape(codes.shape[1], -1, _ACROSS)[..., torch.tensor(_ORDER)]
    return to_stream(across.flatten(1).to(torch.uint8), _BITS)


def _columns(words: Tensor) -> Tensor:
    """The codes of words (R, W): uint8 (8 W, R)."""
    count = words.shape[1] * _ACROSS
    codes = stream(words, _BITS, count).view(len(words), -1, _ACROSS)
    return codes[..., torch.tensor(_ORDER).argsort()].flatten(1).t()
