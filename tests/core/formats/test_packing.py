"""Packing: `unpack` inverts `pack` for every width and size; codes are dense and in the documented bit order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.core.formats import pack, packed_bytes, unpack


def dtypes(bits: int) -> tuple[torch.dtype, ...]:
    """Integer dtypes that can hold codes of `bits` bits."""
    wide = (torch.int32, torch.int64)
    return (torch.uint8, torch.int16, *wide) if bits <= 8 else (torch.int16, *wide) if bits < 16 else wide


@given(bits=st.integers(1, 16), rows=st.integers(1, 9), columns=st.integers(1, 37), seed=st.integers(0, 2**16))
def test_unpack_inverts_pack(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    codes[0, 0] = 2**bits - 1
    for dtype in dtypes(bits):
        packed = pack(codes.to(dtype), bits)
        assert packed.numel() == packed_bytes(codes.numel(), bits) == -(-rows * columns * bits // 8)
        unpacked = unpack(packed, bits, (rows, columns))
        assert unpacked.dtype == (torch.uint8 if bits <= 8 else torch.int32)
        assert torch.equal(unpacked.long(), codes)


@given(bits=st.integers(1, 16), codes=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=40))
def test_bit_order_is_that_of_one_little_endian_number(bits: int, codes: list[int]) -> None:
    codes = [code % 2**bits for code in codes]
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    expected = number.to_bytes(packed_bytes(len(codes), bits), "little")
    assert bytes(pack(torch.tensor(codes, dtype=dtypes(bits)[0]), bits).tolist()) == expected


def test_a_code_that_needs_more_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="code 8 does not fit bits=3; expected 0 to 7"):
        pack(torch.tensor([1, 8], dtype=torch.uint8), 3)


@pytest.mark.parametrize("code", [-1, 4096])
def test_a_wide_code_out_of_range_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match=f"code {code} does not fit bits=12; expected 0 to 4095"):
        pack(torch.tensor([1, code], dtype=torch.int32), 12)


@pytest.mark.parametrize("bits", [0, 17])
def test_a_width_out_of_range_is_refused(bits: int) -> None:
    for call in (lambda: pack(torch.zeros(1, dtype=torch.uint8), bits), lambda: unpack(torch.zeros(8), bits, (1,))):
        with pytest.raises(ValueError, match=f"bits={bits} is out of range; expected 1 to 16"):
            call()
