"""Codes with a scale and an offset for each group: the weights that they stand for, and the bits that they take."""

from __future__ import annotations

import pytest
import torch

from harness.core.formats import OffsetQTensor, OffsetWeight


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_weights_and_bits(bits: int) -> None:
    rows, groups, size = 5, 3, 16
    fmt = OffsetWeight(bits=bits, granularity="group", group_size=size)
    codes = torch.randint(1 << bits, (rows, groups * size), dtype=torch.uint8)
    scale, offset = torch.rand(rows, groups), torch.randn(rows, groups)
    weight = OffsetQTensor(codes, scale, offset, fmt)
    spread = [values.repeat_interleave(size, 1) for values in (scale, offset)]
    assert torch.equal(weight.dequantize(), codes * spread[0] + spread[1])
    assert weight.stored_bits == fmt.stored_bits((rows, groups * size)) == rows * groups * (size * bits + 64)
