"""Trellis codes: values by the formulas, paths by exhaustive search, circles of bits, the error for a normal source."""

from __future__ import annotations

import itertools
import struct

import pytest
import torch
from torch import Tensor

from harness.core.formats.hyb_table import pairs
from harness.core.formats.trellis import LENGTH, Code, Trellis, values
from harness.core.formats.trellis_weight import from_tiles, to_tiles
from harness.core.operators import operator
from harness.kernels.native import library

CPU = torch.device("cpu")
CODES: tuple[Code, ...] = ("1mad", "3inst", "hyb")


def naive_values(code: Code, state: int) -> list[float]:
    if code == "1mad":
        mixed = (34038481 * state + 76625530) % 2**32
        return [(sum(mixed.to_bytes(4, "little")) - 510) / 147.8]
    if code == "3inst":
        mixed = ((89226354 * state + 64248484) % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60
        return [sum(struct.unpack("<ee", mixed.to_bytes(4, "little")))]
    mixed = (state * state + state) % 2**32
    first, second = pairs(CPU)[mixed // 2**6 % 2**9].tolist()
    return [first, second * (-1) ** (mixed // 2**15 % 2)]


@pytest.mark.parametrize("code", CODES)
def test_values_are_those_of_the_formulas(code: Code) -> None:
    table = values(code, 16, CPU)
    for state in (0, 1, 2, 77, 4095, 40000, 65535):
        assert table[:, state].tolist() == pytest.approx(naive_values(code, state), rel=1e-6)
    assert float(table.mean().abs()) < 0.05
    assert float(table.std()) == pytest.approx(1.0, abs=0.3)


def test_the_pairs_are_centres_of_their_cells() -> None:
    """Of a normal distribution whose second value is folded: the fixed point of k-means, up to the sample's noise."""
    sample = torch.randn(400_000, 2, generator=torch.Generator().manual_seed(0))
    sample[:, 1].abs_()
    centres = pairs(CPU)
    assert centres.shape == (512, 2)
    assert bool((centres[:, 1] > 0).all())
    cells = torch.cat([torch.cdist(part, centres).argmin(1) for part in sample.split(50_000)])
    counts = cells.bincount(minlength=512)
    means = torch.zeros(512, 2).index_add_(0, cells, sample) / counts.clamp(min=1)[:, None]
    often = counts > 500
    assert float((means - centres)[often].abs().mean()) < 0.01
    assert float(counts[often].sum()) > 0.9 * len(sample)


def naive_path(targets: Tensor, trellis: Trellis, overlap: int | None) -> tuple[list[int], float]:
    """The best path of a short sequence, by trying every sequence of bits from every first state."""
    table, mask = trellis.values(CPU).T, (1 << trellis.state_bits) - 1
    shared, width = (1 << trellis.state_bits - trellis.step_bits) - 1, trellis.step_bits
    best: tuple[list[int], float] = ([], float("inf"))
    for first in range(mask + 1):
        if overlap is not None and first >> width != overlap:
            continue
        for new in itertools.product(range(1 << width), repeat=len(targets) // trellis.width - 1):
            states = [first]
            for bits in new:
                states.append((states[-1] << width | bits) & mask)
            if overlap is not None and states[-1] & shared != overlap:
                continue
            error = float((targets.double() - table[states].flatten()).square().sum())
            if error < best[1]:
                best = states, error
    return best


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("overlap", [None, 5])
@pytest.mark.parametrize(("code", "bits"), [("1mad", 1), ("1mad", 2), ("1mad", 3), ("hyb", 1)])
def test_a_path_is_the_best_of_all(
    code: Code, bits: int, overlap: int | None, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native and not library.available():
        pytest.skip("the native library is not built")
    if not native:
        monkeypatch.setattr("harness.core.operators.namespace", lambda: None)
    trellis = Trellis(code, bits, 5)
    targets = torch.randn(3, 4 * trellis.width, generator=torch.Generator().manual_seed(bits))
    ends = None if overlap is None else torch.full((3,), overlap % (1 << 5 - trellis.step_bits), dtype=torch.int32)
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
    table = trellis.values(CPU).T
    assert torch.equal(trellis.decode(packed), table[paths.long()].flatten(1))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("code", CODES)
def test_the_operator_decodes_as_torch_does(code: Code, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not library.available():
        pytest.skip("the native library is not built")
    packed = torch.randint(0, 256, (70, 32 * bits), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    for state_bits in (8, 11, 16):
        trellis = Trellis(code, bits, state_bits)
        found = trellis.decode(packed)
        with monkeypatch.context() as patch:
            patch.setattr("harness.core.operators.namespace", lambda: None)
            assert torch.equal(found, trellis.decode(packed))


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


@pytest.mark.parametrize("code", CODES)
def test_levels_find_the_same_paths(code: Code) -> None:
    native = operator("trellis_path") if library.available() else None
    if native is None:
        pytest.skip("the native library is not built")
    targets = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    for bits, state_bits in ((1, 5), (2, 6), (3, 7), (4, 9)):
        trellis = Trellis(code, bits, state_bits if code != "hyb" else state_bits + 4)
        steps, table = targets.view(3, -1, trellis.width), trellis.values(CPU)
        free = torch.full((3,), -1, dtype=torch.int32)
        by_torch = trellis._path(steps, table, free)
        try:
            for level in ("plain", "avx2", "avx512", ""):
                library.set_level(level)
                assert torch.equal(native(steps, table, trellis.step_bits, free), by_torch), level
        finally:
            library.set_level("")


def test_tiles_are_squares_of_a_matrix() -> None:
    matrix = torch.arange(32 * 48).view(32, 48)
    tiles = to_tiles(matrix)
    assert torch.equal(tiles[1, 2], matrix[16:32, 32:48])
    assert torch.equal(from_tiles(tiles), matrix)
