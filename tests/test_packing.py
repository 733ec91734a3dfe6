"""Packing: inverse for every width and size, dense, and in the documented bit order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.core.packing import pack, packed_bytes, unpack


@given(bits=st.integers(1, 8), rows=st.integers(1, 9), columns=st.integers(1, 37), seed=st.integers(0, 2**16))
def test_unpack_inverts_pack(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.numel() == packed_bytes(codes.numel(), bits) == -(-rows * columns * bits // 8)
    assert torch.equal(unpack(packed, bits, (rows, columns)), codes)


@given(bits=st.integers(1, 8), codes=st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_bit_order_is_that_of_one_little_endian_number(bits: int, codes: list[int]) -> None:
    codes = [code % 2**bits for code in codes]
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    expected = number.to_bytes(packed_bytes(len(codes), bits), "little")
    assert bytes(pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist()) == expected


def test_a_code_that_needs_more_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="code 8 does not fit bits=3; expected 0 to 7"):
        pack(torch.tensor([1, 8], dtype=torch.uint8), 3)
