"""The packed layout: unpacking inverts it, its size is that of plain packing, each code is at its documented place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.core.formats import packed_bytes
from harness.kernels.triton.tiles import (
    Layout,
    pack_codes,
    pack_params,
    pack_zero_points,
    unpack_codes,
    unpack_params,
    unpack_zero_points,
)


def random_codes(layout: Layout) -> torch.Tensor:
    return torch.randint(0, 1 << layout.bits, (layout.N, layout.K), dtype=torch.uint8)


@given(st.integers(1, 200), st.integers(1, 12), st.sampled_from((16, 48, 64, 128)), st.sampled_from((4, 8)))
def test_unpacking_groups_is_the_inverse(N: int, groups: int, group_size: int, bits: int) -> None:
    layout = Layout(N, groups * group_size, bits, group_size)
    codes, scale = random_codes(layout), torch.rand(N, groups)
    zero_points = torch.randint(0, 1 << bits, (N, groups), dtype=torch.uint8)
    packed = pack_codes(codes, layout)
    assert packed.nbytes == layout.nbytes
    assert torch.equal(unpack_codes(packed, layout), codes)
    assert torch.equal(unpack_params(pack_params(scale, layout), layout), scale)
    assert torch.equal(unpack_zero_points(pack_zero_points(zero_points, layout), layout), zero_points)


@given(st.integers(1, 130), st.integers(1, 300), st.sampled_from((4, 8)))
def test_unpacking_whole_rows_is_the_inverse(N: int, K: int, bits: int) -> None:
    layout = Layout(N, K, bits, K)
    codes = random_codes(layout)
    assert torch.equal(unpack_codes(pack_codes(codes, layout), layout), codes)


@given(st.integers(1, 3), st.integers(1, 6), st.sampled_from((16, 32, 64, 128)), st.sampled_from((4, 8)))
def test_full_tiles_take_the_bytes_of_the_plain_packing(tiles: int, count: int, group_size: int, bits: int) -> None:
    layout = Layout(64 * tiles, 2 * count * group_size, bits, group_size)
    codes = random_codes(layout)
    assert pack_codes(codes, layout).nbytes == packed_bytes(codes.numel(), bits)
    assert pack_params(codes[:, ::group_size].half(), layout).nbytes == 2 * codes.numel() // group_size
    assert pack_zero_points(codes[:, ::group_size], layout).nbytes == packed_bytes(codes.numel() // group_size, bits)


@pytest.mark.parametrize(("K", "group_size"), [(256, 128), (192, 32), (96, 96), (48, 16), (100, 100)])
def test_every_nibble_is_where_a_lane_wants_it(K: int, group_size: int) -> None:
    layout = Layout(70, K, 4, group_size)
    codes = random_codes(layout)
    packed = pack_codes(codes, layout).tolist()
    half, blocks = layout.half, layout.padded_K // (2 * layout.half)
    lane_bytes = min(half // 2, 16)
    for row in range(0, 70, 3):
        for k in range(K):
            block, inside = divmod(k, 2 * half)
            nibble, inside = divmod(inside, half)
            step, inside = divmod(inside, 16)
            h, t, p = inside // 8, inside % 8 // 2, inside % 2
            tile, w, r, g = row // 64, row % 64 // 16, row % 16 // 8, row % 8
            in_lane = step * 8 + h * 4 + p * 2 + r
            chunk, in_chunk = divmod(in_lane, lane_bytes)
            thread = 32 * w + 4 * g + t
            at = (tile * blocks + block) * 64 * half + chunk * 128 * lane_bytes + thread * lane_bytes + in_chunk
            assert packed[at] >> (4 * nibble) & 0xF == int(codes[row, k]), (row, k)


def test_every_byte_of_8_bits_is_where_a_lane_wants_it() -> None:
    layout = Layout(64, 128, 8, 32)
    codes = random_codes(layout)
    packed = pack_codes(codes, layout).tolist()
    for row in range(64):
        for k in range(128):
            block, byte, step = k // 64, k % 64 // 32, k % 32 // 16
            h, t, p = k % 16 // 8, k % 8 // 2, k % 2
            w, r, g = row // 16, row % 16 // 8, row % 8
            at = block * 64 * 64 + step * 128 * 16 + (32 * w + 4 * g + t) * 16 + h * 8 + r * 4 + p * 2 + byte
            assert packed[at] == int(codes[row, k]), (row, k)


@pytest.mark.parametrize(
    ("K", "group_size", "half"),
    [(128, 128, 64), (576, 64, 32), (576, 576, 32), (96, 32, 16), (192, 96, 32), (100, 100, 64)],
)
def test_half_is_the_largest_that_fits(K: int, group_size: int, half: int) -> None:
    assert Layout(64, K, 4, group_size).half == half


def test_one_scale_of_the_whole_weight_is_stored_a_row() -> None:
    layout = Layout(5, 32, 4, 32)
    assert torch.equal(unpack_params(pack_params(torch.tensor([[0.5]]), layout), layout), torch.full((5, 1), 0.5))


@pytest.mark.parametrize(("bits", "group_size", "match"), [(3, 32, "bits=3"), (4, 24, "group_size=24")])
def test_what_has_no_tiles_is_refused(bits: int, group_size: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Layout(64, 96, bits, group_size)
