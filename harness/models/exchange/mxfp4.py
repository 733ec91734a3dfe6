"""Checkpoints of gpt-oss: the linears of all experts of a block in one tensor of MXFP4.

    <linear>_blocks  (E, N, K / 32, 16) uint8: E2M1, the first input of two in the low half of a byte
    <linear>_scales  (E, N, K / 32) uint8: exponents plus 127

`<linear>` is a parameter of the model, such as `experts.gate_up_proj`, and has no `.weight`.

Source: transformers, integrations/mxfp4.py, convert_moe_packed_tensors; OCP Microscaling Formats, version 1.0.
"""

from __future__ import annotations

import torch

from harness.models.exchange.floats import fp4
from harness.models.exchange.reader import Reader, StoredLinear, bits_of, expect

_BYTES = 16  # of a group of 32


class MXFP4(Reader):
    """Experts with `_blocks` and `_scales`."""

    name = "mxfp4"
    key = "blocks"
    parts = ("blocks", "scales")
    joint = "_"

    def read(self, name: str) -> StoredLinear:
        tensors = self.tensors(name, ("scales",))
        module, _, linear = name.rpartition(".")
        blocks = expect(module, f"{linear}_blocks", tensors["blocks"], torch.uint8, -1, -1, -1, _BYTES)
        scales = expect(module, f"{linear}_scales", tensors["scales"], torch.uint8, *blocks.shape[:3])
        weight = fp4(name, blocks.flatten(2).flatten(0, 1), scales.flatten(0, 1), None)
        return StoredLinear(weight, bits_of(tensors), experts=len(blocks))
