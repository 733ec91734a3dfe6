"""Quantized KV caches: equality with the formulas in float64, bytes, all model families, refusals, and whole runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache

from harness import quantization
from harness.config import build_run
from harness.core import FloatWeight, KVFormat
from harness.core.formats import FloatStates, IntStates, States
from harness.evaluation import perplexity
from harness.nn import kvcache
from harness.runs import execute_run
from tests.conftest import ROOT, resolve
from tests.support.families import FAMILIES, build

Tiny = Callable[..., dict[str, Any]]
GRANULARITIES = ("token", "channel")
SHIPPED = sorted((ROOT / "conf/kv").glob("*.yaml"))
SMALL = ("kv.key.group_size=8", "kv.value.group_size=8")


FLOATS: dict[str, dict[str, Any]] = {
    "fp8": {"element": "e4m3", "granularity": "token", "group_size": -1, "scale_dtype": "bfloat16"},
    "fp8_channel": {"element": "e5m2", "granularity": "channel", "group_size": 8, "scale_dtype": "float32"},
    "nvfp4": {"element": "e2m1", "granularity": "token", "group_size": 8, "scale_dtype": "e4m3"},
    "mxfp4": {"element": "e2m1", "granularity": "channel", "group_size": 8, "scale_dtype": "e8m0"},
}


def states_format(bits: int, granularity: Any, group_size: int = 8, **options: Any) -> IntStates:
    return IntStates(bits=bits, granularity=granularity, group_size=group_size, **options)


def kv_format(bits: int, granularity: Any, group_size: int = 8, residual: int = 0, **options: Any) -> KVFormat:
    fmt = states_format(bits, granularity, group_size, **options)
    return KVFormat(name=f"kv{bits}_{granularity}", key=fmt, value=fmt, residual=residual)


def uneven_states(tokens: int, batch: int = 2, heads: int = 3, head_dim: int = 16) -> Tensor:
    """States (B, heads, T, head_dim) in which every token and every channel has a different size and offset."""
    generator = torch.Generator().manual_seed(tokens)
    noise = torch.randn(batch, heads, tokens, head_dim, generator=generator)
    by_channel = torch.logspace(-1, 1, head_dim)
    by_token = torch.logspace(-0.5, 0.5, tokens)[:, None] if tokens > 1 else torch.ones(1, 1)
    return (noise + by_channel.sin()) * by_channel * by_token


def naive_group(values: np.ndarray[Any, Any], fmt: IntStates) -> np.ndarray[Any, Any]:
    """One group in float64, by the formulas of integer.py with a float zero point, scales stored as float16."""
    largest = 2**fmt.bits - 1
    scale = float(np.float16((values.max() - values.min()) / largest))
    zero_point = float(np.float16(-values.min() / scale))
    quantized = np.clip(np.rint(values / scale + zero_point), 0, largest)
    return np.asarray((quantized - zero_point) * scale)


def naive(states: Tensor, fmt: IntStates, residual: int) -> Tensor:
    """The states that a cache should decode, by a loop over sequences, heads and groups."""
    out = states.double().numpy().copy()
    tokens, head_dim = out.shape[2:]
    coded = max(0, tokens - residual) // fmt.tokens * fmt.tokens
    size = head_dim if fmt.group_size == -1 else fmt.group_size
    for b, h in np.ndindex(out.shape[:2]):
        if fmt.granularity == "token":
            for t in range(coded):
                for c in range(0, head_dim, size):
                    out[b, h, t, c : c + size] = naive_group(out[b, h, t, c : c + size], fmt)
        else:
            for t in range(0, coded, size):
                for c in range(head_dim):
                    out[b, h, t : t + size, c] = naive_group(out[b, h, t : t + size, c], fmt)
    return torch.from_numpy(out)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", FLOATS)
def test_small_floats_are_those_of_weights(name: str) -> None:
    """Each token, or each channel, is rounded as a row of a weight; in any number of calls."""
    options, states = FLOATS[name], uneven_states(16)
    decoded = States(FloatStates(**options)).append(states)
    by_channel = options["granularity"] == "channel"
    rows = (states.transpose(2, 3) if by_channel else states).flatten(0, 2)
    expected = FloatWeight(**options | {"granularity": "group"}).snap_weight(rows)
    expected = expected.view(2, 3, 16, 16)
    assert torch.equal(decoded, expected.transpose(2, 3) if by_channel else expected)
    cache = States(FloatStates(**options))
    for part in states.split([3, 8, 5], 2):
        last = cache.append(part)
    assert torch.equal(last, decoded)
    bits = 8 * sum(tensor.nbytes for tensor in cache.tensors)
    scales = states.numel() // (16 if options["group_size"] == -1 else options["group_size"])
    fmt = FloatStates(**options)
    assert bits == states.numel() * fmt.bits + scales * 8 * fmt.scale_storage.itemsize


@pytest.mark.parametrize("changes", [{"tensor_scale": True}, {"scale_search": "mse"}])
def test_a_growing_cache_has_no_scale_of_the_tensor(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a cache grows token by token; expected tensor_scale=false and"):
        FloatStates(**FLOATS["nvfp4"] | changes)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("tokens", "residual"), [(1, 0), (8, 0), (13, 0), (37, 0), (37, 5), (4, 9)])
def test_decodes_to_the_formulas(granularity: str, bits: int, tokens: int, residual: int) -> None:
    fmt, states = states_format(bits, granularity), uneven_states(tokens)
    decoded = States(fmt, residual).append(states)
    expected = naive(states, fmt, residual)
    assert decoded.shape == states.shape
    assert error(decoded, expected) < 1e-6
    recent = tokens - max(0, tokens - residual) // fmt.tokens * fmt.tokens
    assert torch.equal(decoded[:, :, tokens - recent :], states[:, :, tokens - recent :])
    assert (recent == tokens) == torch.equal(decoded, states)


def test_a_whole_head_can_share_a_scale() -> None:
    fmt, states = states_format(4, "token", -1), uneven_states(9)
    assert error(States(fmt).append(states), naive(states, fmt, 0)) < 1e-6


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("residual", [0, 5])
def test_token_by_token_stores_the_same_as_one_call(granularity: str, residual: int) -> None:
    states = uneven_states(43)
    whole, parts = (States(states_format(3, granularity), residual) for _ in range(2))
    expected = whole.append(states)
    for piece in states.split([17, *[1] * 20, 6], 2):
        decoded = parts.append(piece)
    assert torch.equal(decoded, expected)
    assert len(parts) == len(whole) == 43
    assert all(map(torch.equal, parts.tensors, whole.tensors))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sequences_of_a_batch_do_not_affect_each_other(granularity: str) -> None:
    states = uneven_states(19, batch=4)
    whole = States(states_format(2, granularity)).append(states)
    for i in range(4):
        assert torch.equal(whole[i : i + 1], States(states_format(2, granularity)).append(states[i : i + 1]))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_error_falls_with_bits(granularity: str) -> None:
    states = uneven_states(64)
    errors = [error(States(states_format(bits, granularity)).append(states), states) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 5e-3 < 5e-2 < errors[0]


def test_keys_with_large_channels_need_one_scale_per_channel() -> None:
    states = torch.randn(1, 2, 64, 16)
    states[..., 3] += 30
    states[..., 10] *= 20
    by_token, by_channel = (States(states_format(4, which)).append(states) for which in GRANULARITIES)
    ordinary = [c for c in range(16) if c not in (3, 10)]
    assert error(by_channel[..., ordinary], states[..., ordinary]) < 0.2 * error(
        by_token[..., ordinary], states[..., ordinary]
    )


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_values_that_hardly_differ_are_stored_accurately(granularity: str) -> None:
    level = torch.linspace(-500, 900, 16)
    states = (level * (1 + 1e-6 * torch.randn(1, 1, 8, 1))).expand(1, 1, 8, 16)
    if granularity == "token":
        states = states.mT.contiguous().view(1, 1, 16, 8)
    assert error(States(states_format(2, granularity)).append(states), states) < 1e-3
    zeros = torch.zeros(1, 1, 8, 16)
    assert torch.equal(States(states_format(2, granularity)).append(zeros), zeros)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_decoded_states_have_the_dtype_of_the_input(granularity: str, dtype: torch.dtype) -> None:
    states = uneven_states(16).to(dtype)
    decoded = States(states_format(8, granularity)).append(states)
    assert decoded.dtype == dtype
    assert error(decoded, states) < 1e-2


def test_symmetric_grids_and_integer_zero_points() -> None:
    states = uneven_states(24)
    for options in ({"symmetric": True}, {"symmetric": True, "grid": "narrow"}, {}):
        fmt = states_format(8, "channel", zero_point="integer", **options)
        assert 1e-4 < error(States(fmt).append(states), states) < 2e-2


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_stored_bytes_equal_the_formula_of_the_format(bits: int) -> None:
    batch, heads, head_dim, tokens = 2, 3, 16, 21
    rows = batch * heads
    stored = {}
    for which, options in {"float": {}, "integer": {"zero_point": "integer"}}.items():
        for granularity in GRANULARITIES:
            cache = States(states_format(bits, granularity, **options))
            cache.append(uneven_states(tokens).half())
            stored[which, granularity] = sum(x.untyped_storage().nbytes() for x in cache.tensors)
    for which, zero in (("float", 2), ("integer", 1)):
        groups = tokens * head_dim // 8
        assert stored[which, "token"] == rows * (tokens * head_dim * bits // 8 + groups * (2 + zero))
        coded, recent = 16, 5
        groups = coded // 8 * head_dim
        assert stored[which, "channel"] == rows * (coded * head_dim * bits // 8 + groups * (2 + zero) + recent * 32)


# In models.


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_through_a_coded_cache(family: str) -> None:
    model = build(family)
    tokens = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(2))
    fmt = kv_format(8, "token")
    kvcache.prove(model, fmt)
    with torch.inference_mode():
        expected = model(input_ids=tokens, use_cache=False).logits
        make = kvcache.maker(fmt)
        assert make is not None
        whole = model(input_ids=tokens, past_key_values=make(), use_cache=True).logits
        cache, parts = make(), []
        for piece in tokens.split([13, 1, 1, 5], 1):
            parts.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
    assert cache.get_seq_length() == 20
    assert 0 < error(whole, expected) < 2e-2
    assert error(torch.cat(parts, 1), whole) < 1e-3  # a code may change where float32 rounds in another order


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_sliding_windows_are_masked(family: str) -> None:
    model = build(family, sliding_window=6)
    tokens = torch.randint(3, 128, (1, 24), generator=torch.Generator().manual_seed(2))
    make = kvcache.maker(kv_format(8, "token"))
    assert make is not None
    with torch.inference_mode():
        expected, cache = model(input_ids=tokens, use_cache=False).logits, make()
        parts = [model(input_ids=x, past_key_values=cache, use_cache=True).logits for x in tokens.split(8, 1)]
    assert 0 < error(torch.cat(parts, 1), expected) < 2e-2
    warning = kvcache.check(kv_format(8, "token"), model.config, 24, "m")
    assert warning == (
        "kv=kv8_token stores all 24 tokens in layers that attend to the last 6; kv_mib is larger than necessary"
    )
    assert kvcache.check(kv_format(8, "token"), model.config, 6, "m") is None


def test_perplexity_uses_the_cache_and_does_not_depend_on_batch_size() -> None:
    model = build("llama")
    windows = torch.randint(3, 128, (5, 24), generator=torch.Generator().manual_seed(1))
    plain = perplexity.perplexity(model, windows).window_nll
    for fmt in (kv_format(2, "token"), kv_format(2, "channel")):
        coded = perplexity.perplexity(model, windows, cache=kvcache.maker(fmt)).window_nll
        assert coded != pytest.approx(plain, rel=1e-5)
        for batch_size in (2, 5):
            batched = perplexity.perplexity(model, windows, batch_size, cache=kvcache.maker(fmt)).window_nll
            assert batched == pytest.approx(coded, rel=1e-6)
    fine = perplexity.perplexity(model, windows, cache=kvcache.maker(kv_format(8, "token"))).window_nll
    assert fine == pytest.approx(plain, rel=1e-3)


def test_a_model_that_ignores_its_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    body: Any = model.base_model
    forward = body.forward
    monkeypatch.setattr(body, "forward", lambda **options: forward(**{**options, "past_key_values": None}))
    with pytest.raises(ValueError, match="kv=kv4_token: .* does not use the cache that is passed to it; use kv=none"):
        kvcache.prove(model, kv_format(4, "token"))


@pytest.mark.parametrize(
    "fmt",
    [
        None,
        kv_format(4, "token"),
        kv_format(4, "channel"),
        kv_format(2, "channel", residual=5),
        KVFormat(name="x", key=states_format(2, "channel", 6), value=states_format(3, "channel", 4), residual=7),
    ],
)
def test_computed_bytes_equal_the_bytes_of_a_built_cache(monkeypatch: pytest.MonkeyPatch, fmt: KVFormat | None) -> None:
    lengths = (23, 40, 64)
    monkeypatch.setattr(kvcache, "LENGTHS", (*lengths, 65))
    monkeypatch.setattr(kvcache, "BATCHES", (1, 3))
    model: Any = build("llama")
    per_token, rows = kvcache.footprint(model, fmt)
    assert [(row["length"], row["batch"]) for row in rows] == [(n, b) for n in lengths for b in (1, 3)]
    for row in rows:
        tokens = torch.randint(3, 128, (int(row["batch"]), int(row["length"])))
        make = kvcache.maker(fmt) or DynamicCache
        with torch.inference_mode():
            cache = model(input_ids=tokens, past_key_values=make(), use_cache=True).past_key_values
        assert row["mib"] * 2**20 == kvcache.held_bytes(cache)
    if fmt is None:
        assert per_token == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, channels, bytes
    elif fmt.name == "kv4_token":
        assert per_token == 2 * 2 * 2 * (8 * 4 // 8 + 4)


def test_no_bytes_are_reported_past_positions_or_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvcache, "LENGTHS", (8, 16))
    assert {row["length"] for row in kvcache.footprint(build("mistral", sliding_window=12), None)[1]} == {8}
    with pytest.raises(ValueError, match="68 tokens exceed the model's window or positions"):
        kvcache.footprint(build("llama"), kv_format(4, "channel", 8, residual=60))


# Refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits=1 is out of range; expected 2 to 8"),
        ({"group_size": 0}, "group_size=0 is out of range with granularity=channel; expected a positive number, or -1"),
        ({"group_size": -1}, "group_size=-1 is out of range with granularity=channel"),
        ({"symmetric": True}, "zero_point=float has no use with symmetric=true"),
    ],
)
def test_impossible_formats_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IntStates(**{"bits": 4, "granularity": "channel"} | options)


def test_heads_that_do_not_fit_a_format_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kv.{key,value}.group_size=6 does not divide head_dim=16; use a divisor, or"):
        States(states_format(4, "token", 6)).append(uneven_states(2))
    with pytest.raises(ValueError, match="bits=3 does not fill whole bytes with head_dim=12; use 8 bits, or 4"):
        States(states_format(3, "channel", 6)).append(uneven_states(2, head_dim=12))
    with pytest.raises(ValueError, match=r"kv.{key,value}.scale_dtype=float16 cannot hold the"):
        States(states_format(2, "token", 8)).append(uneven_states(2) * 1e6)
    with pytest.raises(ValueError, match=r"kv.{key,value}.scale_dtype=float16 cannot hold the .*; use .*float32"):
        States(states_format(2, "token", 8)).append(uneven_states(2) * 1e-9)


def test_layers_that_cache_anything_but_keys_and_values_are_refused() -> None:
    shape = AutoConfig.for_model("qwen3_next", num_hidden_layers=4)
    message = "kv=kv4_token cannot replace the LinearAttention.* of model=m; expected layers"
    with pytest.raises(ValueError, match=message):
        kvcache.check(kv_format(4, "token"), shape, 64, "m")
    assert kvcache.held_bytes(DynamicCache(config=shape)) is None
    with pytest.raises(ValueError, match=r"caches more than keys and values \(LinearAttention"):
        kvcache._checked(build("llama"), DynamicCache(config=shape))


# Whole runs.


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_formats_build_and_name_themselves(path: Path) -> None:
    fmt = build_run(resolve(f"kv={path.stem}")).kv
    if path.stem == "none":
        assert fmt is None
        return
    assert fmt is not None
    assert fmt.label == path.stem + (" residual=128" if fmt.residual else "")
    bits = {"element": "e3m3"} if isinstance(fmt.key, FloatStates) else {"bits": 5}
    other = replace(fmt.key, group_size=8, **bits)
    changed = " ".join(f"{key}={value}" for key, value in bits.items())
    assert replace(fmt, key=other, value=other).label.startswith(f"{path.stem} {changed} group_size=8")
    assert "value.group_size=8" in replace(fmt, value=replace(fmt.value, group_size=8)).label
    turned = replace(fmt.key, rotated=not fmt.key.rotated)
    assert f"key.rotated={turned.rotated}" in replace(fmt, key=turned).label


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (("kv=rotated_lm3", "kv.key.bits=4", "kv.value.bits=4"), "rotated_lm3 bits=4"),
        (("kv=rotated_lm4", "kv.key.rotated=false", "kv.value.rotated=false"), "rotated_lm4 rotated=False"),
        (("kv=kv4_token", "kv.key.rotated=true"), "kv4_token key.rotated=True"),
        (("kv=nvfp4", "kv.value.scale_dtype=float32"), "nvfp4 value.scale_dtype=float32"),
        (("kv=lm4", "kv.key.scale_dtype=bfloat16"), "lm4 key.scale_dtype=bfloat16"),
    ],
)
def test_a_changed_format_is_told_apart(overrides: tuple[str, ...], label: str) -> None:
    fmt = build_run(resolve(*overrides)).kv
    assert fmt is not None
    assert fmt.label == label


def test_a_run_with_a_coded_cache(tiny: Tiny) -> None:
    timed = ("measure=quick", "measure.prompt_len=8", "measure.repeats=1", "measure.decode_tokens=3")
    plain, coded, quantized = (
        execute_run(tiny(*timed, *more))[0]
        for more in (("method=none",), ("method=none", "kv=kv4_token", *SMALL), ("kv=kv4_token", *SMALL))
    )
    assert (plain.status, coded.status, quantized.status) == ("ok", "ok", "ok"), (
        plain.error,
        coded.error,
        quantized.error,
    )
    assert len({plain.run_id, coded.run_id, quantized.run_id}) == 3
    assert coded.config["kv"]["key"]["bits"] == 4
    assert coded.execution.kv == "kv4_token group_size=8"
    assert plain.execution.kv is None
    assert coded.metrics["perplexity"] != plain.metrics["perplexity"]
    assert coded.metrics["perplexity"] == pytest.approx(plain.metrics["perplexity"], rel=0.02)
    tokens = 8 + 1 + 3
    assert plain.metrics["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, channels, bytes
    assert coded.metrics["kv_bytes_per_token"] == 2 * 2 * 2 * (16 // 2 + 2 * 4)
    for record in (plain, coded, quantized):
        assert record.metrics["kv_mib"] == tokens * record.metrics["kv_bytes_per_token"] / 2**20
        assert {row["length"] for row in record.kv} == {2048}
        mib = {row["batch"]: row["mib"] for row in record.kv}
        assert mib[1] == 2048 * record.metrics["kv_bytes_per_token"] / 2**20
        assert mib[32] == 32 * mib[1]


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.stem != "none"], ids=lambda path: path.stem)
def test_the_cache_is_read(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """A corrupted cache moves the perplexity: keys and values of a run come from the stored codes."""
    fmt = build_run(resolve(f"kv={path.stem}")).kv
    assert fmt is not None
    groups = SMALL if fmt.key.group_size != -1 else ()
    overrides = ("method=none", f"kv={path.stem}", *groups, *(["kv.residual=8"] if fmt.residual else []))
    sound = execute_run(tiny(*overrides))[0]
    assert sound.status == "ok", sound.error
    decode = States._decode
    monkeypatch.setattr(States, "_decode", lambda self, head_dim: decode(self, head_dim).roll(1, -1))
    corrupted = execute_run(tiny(*overrides, "force=true"))[0]
    assert corrupted.run_id == sound.run_id
    assert abs(corrupted.metrics["nll"] - sound.metrics["nll"]) > 1e-3


def test_a_rotated_cache_gives_another_result_from_equal_bytes(tiny: Tiny) -> None:
    plain, rotated = (execute_run(tiny("method=none", f"kv={kv}", *SMALL))[0] for kv in ("lm4", "rotated_lm4"))
    assert (plain.status, rotated.status) == ("ok", "ok"), (plain.error, rotated.error)
    assert plain.run_id != rotated.run_id
    assert plain.metrics["nll"] != rotated.metrics["nll"]
    expected = 2 * 2 * 2 * (16 // 2 + 2 * 2)  # layers, keys and values, heads; codes and scales
    assert plain.metrics["kv_bytes_per_token"] == rotated.metrics["kv_bytes_per_token"] == expected


def test_batch_size_does_not_change_a_run(tiny: Tiny) -> None:
    one, two = (execute_run(tiny("kv=kv2_channel", f"data.batch_size={n}"))[0].window_nll for n in (1, 2))
    assert one == pytest.approx(two, rel=1e-6)


def test_simulated_weights_report_no_cache(tiny: Tiny) -> None:
    record = execute_run(tiny("execution=simulated", "kv=kv8_channel"))[0]
    assert record.status == "ok", record.error
    assert record.kv == []
    assert not [name for name in record.metrics if name.startswith("kv")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("kv=kv4_token",), "kv.{key,value}.group_size=32 does not divide head_dim=16; use a divisor, or -1"),
        (("kv=kv4_token", "kv.key.bits=9"), "kv.key.bits=9 is out of range; expected 2 to 8"),
        (("kv=lm4", "kv.key.bits=9"), "kv.key.bits=9 does not match table=lloyd_max; expected 2 to 8"),
        (("kv=lm4", "kv.key.table=nf4"), "kv.key.table='nf4' is unknown; expected"),
        (("kv=kv4_token", "kv.key.rotated=2"), "kv.key.rotated=2 has type int; expected bool"),
        (("kv=kv4_token", "kv.residual=-1"), "kv.residual=-1 is out of range; expected 0 or more"),
        (
            ("kv=kv4_channel", "kv.residual=60"),
            "kv.residual=60 and groups of 32 tokens leave all tokens of data.seq_len=64 float",
        ),
    ],
)
def test_runs_are_refused_before_quantization(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(quantization, "quantize", lambda *_: pytest.fail("quantized before the refusal"))
    record = execute_run(tiny(*overrides))[0]
    assert record.status == "failed"
    assert str(record.error).startswith(message)


def test_a_run_without_a_coded_cache_stores_no_keys(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvcache, "footprint", lambda *_: (0.0, []))
    monkeypatch.setattr(DynamicCache, "__init__", lambda *_args, **_options: pytest.fail("a cache was made"))
    record = execute_run(tiny("method=none"))[0]
    assert record.status == "ok", record.error
