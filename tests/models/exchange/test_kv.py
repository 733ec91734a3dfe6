"""KV caches that checkpoints prescribe: FP8 with calibrated scales, of a layer or of each head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.core.formats import States
from harness.models.quantized import QuantizedSource
from harness.nn import kvcache
from tests.models.exchange.test_integers import source_of
from tests.models.exchange.test_libraries import DATA
from tests.runs.test_checkpoint import row
from tests.support import checkpoints as made

FOLDER = DATA / "modelopt_fp8_kv"
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
Scales = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.floats(tmp_path_factory.mktemp("base") / "float")


def with_scales(base: Path, folder: Path, scheme: Any, scales: Scales) -> QuantizedSource:
    """A checkpoint of compressed-tensors with a `kv_cache_scheme` and tensors `scales`."""

    def encode(name: str, weight: Tensor) -> made.Parts:
        codes, scale, _ = made.grid(weight, 8, weight.shape[1], True)
        return {"weight": (codes - 128).to(torch.int8), "weight_scale": scale}

    args = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": args}}
    section = {"quant_method": "compressed-tensors", "config_groups": groups, "kv_cache_scheme": scheme}
    made.quantized(base, folder, section, encode)
    file = folder / "model.safetensors"
    save_file(load_file(file) | scales, file, metadata={"format": "pt"})
    return source_of(folder)


def scales_of(base: Path, scale: Callable[[int], Tensor]) -> Scales:
    """A tensor for the keys and one for the values of each layer; `scale` is called with a running number."""
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    names = [f"model.layers.{i}.self_attn.{kind}_scale" for i in range(layers) for kind in "kv"]
    return {name: scale(i) for i, name in enumerate(names)}


def loaded(source: QuantizedSource) -> list[str]:
    """The warnings of a load."""
    warnings: list[str] = []
    source.load(torch.float32, torch.device("cpu"), warnings.append)
    return warnings


def test_states_are_those_of_the_library() -> None:
    kv = source_of(FOLDER).kv
    assert kv is not None
    states = load_file(FOLDER / "states.safetensors")
    assert len(states) == 4
    for name, (given, rounded) in states.items():
        layer, kind = name.split(".")
        fmt = getattr(kv.of_layer(int(layer)), {"k": "key", "v": "value"}[kind])
        torch.testing.assert_close(States(fmt).append(given), rounded, rtol=1e-6, atol=0)


def test_each_layer_has_its_own_scales(base: Path, tmp_path: Path) -> None:
    scales = scales_of(base, lambda i: torch.tensor([2.0**-i]))
    source = with_scales(base, tmp_path / "q", SCHEME, scales)
    assert loaded(source) == []
    assert source.kv is not None
    model: Any = source.load(torch.float32, torch.device("cpu"))
    kvcache.prove(model, source.kv)
    make = kvcache.maker(source.kv)
    assert make is not None
    cache = make()
    with torch.inference_mode():
        model(torch.arange(8)[None], past_key_values=cache)
    found = [layer.stored[kind].fmt.calibrated for layer in cache.layers for kind in (0, 1)]
    assert found == [(2.0**-i,) for i in range(len(scales))]
    assert kvcache.held_bytes(cache) == sum(layer.stored[0].tensors[0].nbytes * 2 for layer in cache.layers)


def test_a_scale_for_each_head(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    heads, width = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
    per_head = torch.logspace(-2, 0, heads).view(heads, 1, 1)
    source = with_scales(
        base, tmp_path / "q", SCHEME | {"strategy": "attn_head"}, scales_of(base, lambda _: per_head.clone())
    )
    assert source.kv is not None
    given = torch.randn(2, heads, 3, width)
    scaled = (given / per_head).clamp(-448, 448).to(torch.float8_e4m3fn).float() * per_head
    torch.testing.assert_close(States(source.kv.key).append(given), scaled, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="calibrated scales for 1 heads"):
        States(source.kv.key).append(given[:, :1])


@pytest.mark.parametrize(
    ("scheme", "scales"),
    [
        (SCHEME, lambda base: {}),
        (SCHEME | {"dynamic": True}, lambda base: scales_of(base, lambda _: torch.ones(1))),
        (SCHEME | {"type": "int"}, lambda base: scales_of(base, lambda _: torch.ones(1))),
    ],
)
def test_what_is_not_applied_is_a_warning(
    base: Path, tmp_path: Path, scheme: Any, scales: Callable[[Path], Scales]
) -> None:
    source = with_scales(base, tmp_path / "q", scheme, scales(base))
    assert source.kv is None
    warning = "model=q: its kv_cache_scheme is not applied: expected FP8 with calibrated scales; use the axis kv"
    assert warning in loaded(source)


def test_broken_scales_are_one_line(base: Path, tmp_path: Path) -> None:
    scales = scales_of(base, lambda _: torch.ones(1))
    name = next(iter(scales))
    with pytest.raises(ValueError, match=r"cannot be read \(it has scales for 3 of the 4 keys and values"):
        _ = with_scales(base, tmp_path / "a", SCHEME, {n: x for n, x in scales.items() if n != name}).kv
    with pytest.raises(ValueError, match=rf"cannot be read \({name} is no positive number\)"):
        _ = with_scales(base, tmp_path / "b", SCHEME, scales | {name: -torch.ones(1)}).kv


def test_a_run_applies_the_scales_unless_it_names_another_cache(tmp_path: Path) -> None:
    base = made.with_tokenizer(made.floats(tmp_path / "float", vocab_size=256))
    with_scales(base, tmp_path / "q", SCHEME, scales_of(base, lambda _: torch.tensor([1.0])))
    folder = made.with_tokenizer(tmp_path / "q")
    own, other = (row(tmp_path / "r", f"model.path={folder}", "method=checkpoint", *kv) for kv in ((), ("kv=fp8",)))
    assert (own.status, other.status) == ("ok", "ok"), (own.error, other.error)
    assert (own.execution.kv, other.execution.kv) == ("fp8_calibrated", "fp8")
    assert own.window_nll != other.window_nll
    assert not [warning for warning in own.warnings if "scale" in warning]
