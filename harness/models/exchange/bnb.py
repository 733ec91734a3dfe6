"""Checkpoints of bitsandbytes, as transformers writes them.

    4 bits  weight (N K / 2, 1) uint8, the first value in the high half of a byte; weight.absmax, weight.quant_map;
            weight.quant_state.bitsandbytes__nf4 or __fp4: JSON in uint8; doubly quantized scales also
            weight.nested_absmax and weight.nested_quant_map
    8 bits  weight (N, K) int8, SCB (N,) float32: 127 times the scale of a row; rows of inputs at run time, with outlier
            channels in floats

Source: bitsandbytes, functional.py, QuantState.from_dict; Dettmers et al. 2022, arXiv 2208.07339.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import torch
from torch import Tensor

from harness.core import IntActivation, LevelsQTensor, LevelsWeight
from harness.core.formats import InputQuantizer
from harness.core.formats.packing import pack
from harness.models.exchange.integers import integers, unsigned
from harness.models.exchange.reader import (
    Reader,
    StoredLinear,
    Tensors,
    bits_of,
    damaged,
    expect,
    restored,
    unsupported,
)

_STATE = "weight.quant_state.bitsandbytes__"
_TABLES: tuple[Literal["nf4", "fp4"], ...] = ("nf4", "fp4")
_NESTED_BLOCK = 256
_SCALES, _THRESHOLD = 127.0, 6.0


class Bnb4(Reader):
    """Linears with `weight.absmax`."""

    name = "bitsandbytes"
    key = "weight.absmax"
    parts = (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        f"{_STATE}nf4",
        f"{_STATE}fp4",
    )

    def read(self, name: str) -> StoredLinear:
        tensors = self.tensors(name, ("weight", "weight.quant_map"))
        table = next((table for table in _TABLES if f"{_STATE}{table}" in tensors), None)
        if table is None:
            raise damaged(f"{name}.{_STATE}nf4 is absent")
        state = _json(name, tensors[f"{_STATE}{table}"])
        rows, columns = _shape(name, state)
        size = int(state.get("blocksize", 64))
        packed = expect(name, "weight", tensors["weight"].reshape(-1), torch.uint8, -(-rows * columns // 2))
        codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[: rows * columns]
        blocks = -(-rows * columns // size)
        nested = "weight.nested_absmax" in tensors
        expect(name, "weight.absmax", tensors["weight.absmax"], torch.uint8 if nested else torch.float32, blocks)
        fmt = LevelsWeight(table=table, granularity="flat", group_size=size, double_quant=nested, scale_dtype="float32")
        by_rows = (rows, columns // size) if columns % size == 0 else (1, blocks)
        buffers: dict[str, Tensor | None] = {
            "qweight": pack(codes, fmt.bits),
            "levels": _levels(name, tensors["weight.quant_map"], fmt),
            "scale": tensors["weight.absmax"].view(by_rows),
            **(_nested(name, tensors, state, blocks) if nested else _no_nested()),
        }
        return StoredLinear(restored(LevelsQTensor, (rows, columns), fmt, buffers), bits_of(tensors))


class Bnb8(Reader):
    """Linears with `SCB`."""

    name = "bitsandbytes"
    key = "SCB"
    parts = ("weight", "SCB", "weight_format")

    def read(self, name: str) -> StoredLinear:
        tensors = self.tensors(name, ("weight",))
        codes = expect(name, "weight", tensors["weight"], torch.int8, -1, -1)
        scale = expect(name, "SCB", tensors["SCB"], torch.float32, len(codes))
        weight = integers(name, unsigned(name, codes, 8), (scale / _SCALES)[:, None], None, 8)
        threshold = float(self.section.get("llm_int8_threshold", _THRESHOLD))
        fmt = IntActivation(bits=8, symmetric=True, grid="narrow", threshold=threshold if threshold > 0 else None)
        return StoredLinear(weight, bits_of(tensors), InputQuantizer(fmt))


def _levels(name: str, stored: Tensor, fmt: LevelsWeight) -> Tensor:
    """The table of the file, which must be the format's: weights are decoded by that.

    Raises: CheckpointError if it is another one.
    """
    expect(name, "weight.quant_map", stored, torch.float32, 16)
    if not torch.equal(stored, fmt.levels):
        raise damaged(f"{name}.weight.quant_map is not the table of {fmt.table}")
    return stored


def _json(name: str, state: Tensor) -> dict[str, Any]:
    try:
        content = json.loads(bytes(state.to(torch.uint8).tolist()))
    except ValueError as error:
        raise damaged(f"{name}.{_STATE}* is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise damaged(f"{name}.{_STATE}* holds no mapping")
    return content


def _shape(name: str, state: dict[str, Any]) -> tuple[int, int]:
    sizes = state.get("shape")
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise damaged(f"{name} has shape={sizes} in its quant_state")
    return sizes[0], sizes[1]


def _nested(name: str, tensors: Tensors, state: dict[str, Any], blocks: int) -> dict[str, Tensor | None]:
    """The buffers of doubly quantized scales."""
    if (size := state.get("nested_blocksize", _NESTED_BLOCK)) != _NESTED_BLOCK:
        raise unsupported("nested_blocksize", size, str(_NESTED_BLOCK))
    scale, levels = tensors["weight.nested_absmax"], tensors.get("weight.nested_quant_map")
    if levels is None:
        raise damaged(f"{name}.weight.nested_quant_map is absent")
    return {
        "nested_scale": expect(name, "weight.nested_absmax", scale, torch.float32, -(-blocks // _NESTED_BLOCK)),
        "nested_levels": expect(name, "weight.nested_quant_map", levels, torch.float32, 256),
        "offset": torch.tensor(float(state.get("nested_offset", 0.0))),
    }


def _no_nested() -> dict[str, Tensor | None]:
    return dict.fromkeys(("nested_scale", "nested_levels", "offset"))
