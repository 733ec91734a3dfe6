"""States in Lloyd-Max levels, and rotated states of any format: brute force, norms, bytes, outliers, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.core import hadamard
from harness.core.formats import FloatStates, IntStates, LevelsStates, States, tables, unpack

# Positive levels of Max 1960, "Quantizing for minimum distortion", table I.
MAX = {
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}


def levels_states(bits: int = 4, **options: Any) -> LevelsStates:
    return LevelsStates(**{"table": "lloyd_max", "bits": bits, "granularity": "token", "group_size": 8} | options)


FORMATS: dict[str, Any] = {
    "int": lambda **options: IntStates(bits=4, granularity="token", **{"group_size": 8} | options),
    "float": lambda **options: FloatStates(element="e2m1", granularity="token", **{"group_size": 8} | options),
    "levels": levels_states,
}


def uneven_states(tokens: int, head_dim: int = 16) -> Tensor:
    """States (2, 3, T, head_dim) in which every token and every group of channels has a different size."""
    generator = torch.Generator().manual_seed(tokens)
    noise = torch.randn(2, 3, tokens, head_dim, generator=generator)
    return noise * torch.logspace(-1, 1, head_dim) * torch.logspace(-0.5, 0.5, tokens)[:, None]


def outlier_states(head_dim: int = 64) -> Tensor:
    """States (1, 2, 50, head_dim) with one channel that is large in every token."""
    states = torch.randn(1, 2, 50, head_dim, generator=torch.Generator().manual_seed(5))
    states[..., 5] += 30
    return states


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def naive_group(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and decoded values of one group in float64, the nearest of all levels by brute force."""
    exact = values.double()
    rms = exact.square().mean().sqrt()
    codes = (exact[:, None] / rms - table.double()).abs().argmin(1)
    found = table.double()[codes]
    scale = (exact.norm() / found.norm()).half().double()
    return codes, found * scale


@pytest.mark.parametrize("bits", MAX)
def test_levels_are_those_of_max(bits: int) -> None:
    positive = torch.tensor(MAX[bits])
    expected = torch.cat([-positive.flip(0), positive])
    torch.testing.assert_close(tables.levels("lloyd_max", bits), expected, rtol=5e-4, atol=0)  # printed with 4 digits


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [4, 8, -1])
def test_each_group_has_the_nearest_levels_of_its_root_mean_square(bits: int, group_size: int) -> None:
    fmt, states = levels_states(bits, group_size=group_size), uneven_states(9)
    states[0, 0, 2, 3] = 500
    cache = States(fmt)
    decoded = cache.append(states)
    table, size = tables.levels("lloyd_max", bits), 16 if group_size == -1 else group_size
    groups = [naive_group(group, table) for group in states.reshape(-1, size)]
    codes = unpack(cache.tensors[0].view(-1), bits, (states.numel() // size, size))
    assert torch.equal(codes.long(), torch.stack([group[0] for group in groups]))
    assert error(decoded, torch.stack([group[1] for group in groups]).view(states.shape)) < 1e-6


@pytest.mark.parametrize("rotated", [False, True])
def test_heads_may_lie_apart_in_memory(rotated: bool) -> None:
    states = uneven_states(9)
    apart = states.transpose(1, 2).contiguous().transpose(1, 2)
    fmt = levels_states(3, rotated=rotated)
    assert torch.equal(States(fmt).append(apart), States(fmt).append(states))


def test_a_group_of_consecutive_tokens_of_one_channel() -> None:
    states = uneven_states(16)
    by_channel = States(levels_states(granularity="channel")).append(states)
    by_token = States(levels_states()).append(states.mT.contiguous())
    assert torch.equal(by_channel, by_token.mT)


@pytest.mark.parametrize(("scale_dtype", "most"), [("float16", 2**-11), ("bfloat16", 2**-8), ("float32", 1e-6)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decoded_groups_keep_their_norm(scale_dtype: str, most: float, bits: int) -> None:
    states = uneven_states(31)
    states[1, 2, 7] = 0
    states[0, 1, 3, 4] = 900
    decoded = States(levels_states(bits, scale_dtype=scale_dtype)).append(states)
    before, after = (x.unflatten(-1, (-1, 8)).double().norm(dim=-1) for x in (states, decoded))
    assert ((after - before).abs() <= 1.01 * most * before).all()
    assert not decoded[1, 2, 7].any()
    assert error(decoded, states) > 0.02, "nothing was rounded"


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_zeros_decode_to_zeros(dtype: torch.dtype, rotated: bool) -> None:
    zeros = torch.zeros(1, 2, 3, 16, dtype=dtype)
    for scale_dtype in ("float16", "bfloat16"):
        decoded = States(levels_states(2, scale_dtype=scale_dtype, rotated=rotated)).append(zeros)
        assert torch.equal(decoded, zeros)
        assert decoded.dtype == dtype


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [8, -1])
def test_rotated_states_take_the_same_bytes(bits: int, group_size: int) -> None:
    states = uneven_states(21)
    stored = []
    for rotated in (False, True):
        cache = States(levels_states(bits, group_size=group_size, rotated=rotated))
        cache.append(states)
        stored.append(sum(x.untyped_storage().nbytes() for x in cache.tensors))
    vectors = 2 * 3 * 21
    assert stored == [vectors * (16 * bits // 8 + 2 * (2 if group_size == 8 else 1))] * 2


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 80, 96])
def test_a_rotated_cache_encodes_the_rotated_states(name: str, head_dim: int) -> None:
    states = uneven_states(5, head_dim)
    decoded = States(FORMATS[name](rotated=True)).append(states)
    plain = States(FORMATS[name]()).append(hadamard.rotate(states.double()).float())
    assert error(decoded, hadamard.unrotate(plain)) < 1e-6
    assert 0.01 < error(decoded, states) < 0.2
    assert error(decoded, States(FORMATS[name]()).append(states)) > 0.01


@pytest.mark.parametrize("name", FORMATS)
def test_a_rotation_spreads_an_outlier_channel(name: str) -> None:
    states = outlier_states()
    plain, rotated = (States(FORMATS[name](group_size=-1, rotated=rotated)).append(states) for rotated in (False, True))
    ordinary = [c for c in range(64) if c != 5]
    assert error(rotated[..., ordinary], states[..., ordinary]) < 0.6 * error(
        plain[..., ordinary], states[..., ordinary]
    )


def test_levels_of_an_outlier_channel_need_a_rotation() -> None:
    states = outlier_states()
    plain, rotated = (States(levels_states(group_size=32, rotated=rotated)).append(states) for rotated in (False, True))
    assert error(rotated, states) < 0.5 * error(plain, states)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("residual", [0, 5])
def test_token_by_token_stores_the_same_as_one_call(name: str, residual: int) -> None:
    states = uneven_states(43, 80)
    whole, parts = (States(FORMATS[name](rotated=True), residual) for _ in range(2))
    expected = whole.append(states)
    for piece in states.split([17, *[1] * 20, 6], 2):
        decoded = parts.append(piece)
    assert all(map(torch.equal, parts.tensors, whole.tensors))
    assert error(decoded, expected) < 1e-6
    recent = 43 - residual
    assert torch.equal(decoded[:, :, recent:], states[:, :, recent:]), "the newest tokens stay float"
    assert error(decoded[:, :, :recent], states[:, :, :recent]) > 0.01


def test_sequences_of_a_batch_do_not_affect_each_other() -> None:
    states = uneven_states(19)
    whole = States(levels_states(2, rotated=True))
    whole.append(states)
    for i in range(2):
        alone = States(levels_states(2, rotated=True))
        alone.append(states[i : i + 1])
        assert all(torch.equal(one, all_[i : i + 1]) for one, all_ in zip(alone.tensors, whole.tensors, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_values_have_the_error_of_max(bits: int) -> None:
    """The distortion D of normal values, Max 1960, table I: with a corrected norm it is 2 - 2 sqrt(1 - D)."""
    distortion = {2: 0.1175, 3: 0.03454, 4: 0.009497}[bits]
    states = torch.randn(1, 2, 64, 2048, generator=torch.Generator().manual_seed(3))
    squared = error(States(levels_states(bits, group_size=-1)).append(states), states) ** 2
    assert math.isclose(squared, 2 - 2 * math.sqrt(1 - distortion), rel_tol=0.02)


# Refusals.


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (1e6, "kv.{key,value}.scale_dtype=float16 cannot hold the scale .*; use .*=float32"),
        (1e-9, "kv.{key,value}.scale_dtype=float16 cannot hold the scales.*; use .*=float32"),
        (1e-30, "kv.{key,value}.scale_dtype=float16 cannot hold the scales.*; use .*=float32"),
        (math.nan, "kv.{key,value}.scale_dtype=float16 cannot hold the scale nan"),
        (math.inf, "kv.{key,value}.scale_dtype=float16 cannot hold the scale"),
    ],
)
@pytest.mark.parametrize("rotated", [False, True])
def test_states_beyond_the_range_of_the_scale_are_refused(factor: float, message: str, rotated: bool) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        States(levels_states(rotated=rotated)).append(uneven_states(2) * factor)
    assert "\n" not in str(refusal.value)


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="kv.{key,value}.group_size=6 does not divide head_dim=16; use a divisor"):
        States(levels_states(group_size=6)).append(uneven_states(2))
    with pytest.raises(ValueError, match="bits=3 does not fill whole bytes with head_dim=12; use 8 bits, or 4"):
        States(levels_states(3, group_size=-1, rotated=True)).append(uneven_states(2, 12))


def test_wider_scales_hold_what_float16_cannot() -> None:
    for factor in (1e30, 1e6, 1e-9, 1e-30):
        states = uneven_states(4) * factor
        for scale_dtype in ("bfloat16", "float32"):
            assert error(States(levels_states(scale_dtype=scale_dtype)).append(states), states) < 0.2


def test_a_tiny_group_of_a_large_token_does_not_count() -> None:
    states = uneven_states(3)
    states[..., :8] *= 1e-9
    decoded = States(levels_states()).append(states)
    assert error(decoded, states) < 0.2
    assert torch.isfinite(decoded).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits=1 does not match table=lloyd_max; expected 2 to 8"),
        ({"bits": 9}, "bits=9 does not match table=lloyd_max; expected 2 to 8"),
        ({"group_size": 0}, "group_size=0 is out of range with granularity=token"),
    ],
)
def test_impossible_formats_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        levels_states(**options)
