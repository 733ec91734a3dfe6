"""Trellis codes: values by the formulas, paths by exhaustive search, circles of bits, the error for a normal source."""

from __future__ import annotations

import itertools
import struct

import pytest
import torch
from torch import Tensor

from harness.core.formats.trellis import LENGTH, Code, Trellis, values
from harness.core.formats.trellis_weight import from_tiles, to_tiles
from harness.core.operators import operator
from harness.kernels.native import library

CPU = torch.device("cpu")
CODES: tuple[Code, ...] = ("1mad", "3inst")


def naive_value(code: Code, state: int) -> float:
    if code == "1mad":
        mixed = (34038481 * state + 76625530) % 2**32
        return (sum(mixed.to_bytes(4, "little")) - 510) / 147.8
    mixed = ((89226354 * state + 64248484) % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60
    return sum(struct.unpack("<ee", mixed.to_bytes(4, "little")))


@pytest.mark.parametrize("code", CODES)
def test_values_are_those_of_the_formulas(code: Code) -> None:
    table = values(code, 16, CPU)
    for state in (0, 1, 2, 77, 4095, 40000, 65535):
        assert float(table[state]) == pytest.approx(naive_value(code, state), rel=1e-6)
    assert float(table.mean().abs()) < 0.02
    assert float(table.std()) == pytest.approx(1.0, abs=0.3)


def naive_path(targets: Tensor, trellis: Trellis, overlap: int | None) -> tuple[list[int], float]:
    """The best path of a short sequence, by trying every sequence of bits from every first state."""
    table, mask = trellis.values(CPU).tolist(), (1 << trellis.state_bits) - 1
    shared = (1 << trellis.state_bits - trellis.bits) - 1
    best: tuple[list[int], float] = ([], float("inf"))
    for first in range(mask + 1):
        if overlap is not None and first >> trellis.bits != overlap:
            continue
        for new in itertools.product(range(1 << trellis.bits), repeat=len(targets) - 1):
            states = [first]
            for bits in new:
                states.append((states[-1] << trellis.bits | bits) & mask)
            if overlap is not None and states[-1] & shared != overlap:
                continue
            error = sum((float(x) - table[state]) ** 2 for x, state in zip(targets, states, strict=True))
            if error < best[1]:
                best = states, error
    return best


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("overlap", [None, 5])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_path_is_the_best_of_all(
    bits: int, overlap: int | None, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native and operator("trellis_path") is None:
        pytest.skip("the native library is not built")
    if not native:
        monkeypatch.setattr("harness.core.operators.namespace", lambda: None)
    trellis = Trellis("1mad", bits, 5)
    targets = torch.randn(3, 4, generator=torch.Generator().manual_seed(bits))
    ends = None if overlap is None else torch.full((3,), overlap % (1 << 5 - bits), dtype=torch.int32)
    found = trellis.path(targets, ends)
    for row, states in zip(targets, found.tolist(), strict=True):
        expected, error = naive_path(row, trellis, None if ends is None else int(ends[0]))
        assert states == expected
        assert error < float("inf")


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("code", CODES)
def test_a_circle_of_bits_decodes_to_its_path(code: Code, bits: int) -> None:
    trellis = Trellis(code, bits, 10)
    paths = trellis.nearest(torch.randn(5, LENGTH, generator=torch.Generator().manual_seed(0)))
    packed = trellis.pack(paths)
    assert packed.shape == (5, 32 * bits)
    assert torch.equal(trellis.states(packed), paths)
    table = trellis.values(CPU)
    assert torch.equal(trellis.decode(packed), table[paths.long()])


def test_random_bits_are_a_path() -> None:
    trellis = Trellis("1mad", 3, 16)
    packed = torch.randint(0, 256, (4, 96), dtype=torch.uint8)
    states = trellis.states(packed)
    following = states.roll(-1, 1)
    assert torch.equal(following >> 3, states & (1 << 13) - 1)
    assert torch.equal(trellis.pack(states), packed)


@pytest.mark.parametrize("level", ["native", "torch"])
def test_the_error_for_a_normal_source_falls_with_the_states(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 2 bits between the bound of the rate, 1/16, and that of the best scalar quantizer, 0.1175."""
    if level == "torch":
        monkeypatch.setattr("harness.core.operators.namespace", lambda: None)
    source = torch.randn(12, LENGTH, generator=torch.Generator().manual_seed(1))
    errors = []
    for state_bits in (8, 10, 12):
        trellis = Trellis("1mad", 2, state_bits)
        size = float(trellis.values(CPU).square().mean().sqrt())
        decoded = trellis.decode(trellis.pack(trellis.nearest(source * size))) / size
        errors.append(float((decoded - source).square().mean()))
    assert 1 / 16 < errors[2] < errors[1] < errors[0] < 0.1175


def test_levels_find_the_same_paths() -> None:
    native = operator("trellis_path")
    if native is None:
        pytest.skip("the native library is not built")
    targets = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    for bits, state_bits in ((1, 5), (2, 6), (3, 7), (4, 9)):
        trellis = Trellis("3inst", bits, state_bits)
        free = torch.full((3,), -1, dtype=torch.int32)
        by_torch = trellis._path(targets, trellis.values(CPU), free)
        try:
            for level in ("plain", "avx2", "avx512", ""):
                library.set_level(level)
                assert torch.equal(native(targets, trellis.values(CPU), bits, free), by_torch), level
        finally:
            library.set_level("")


def test_tiles_are_squares_of_a_matrix() -> None:
    matrix = torch.arange(32 * 48).view(32, 48)
    tiles = to_tiles(matrix)
    assert torch.equal(tiles[1, 2], matrix[16:32, 32:48])
    assert torch.equal(from_tiles(tiles), matrix)
