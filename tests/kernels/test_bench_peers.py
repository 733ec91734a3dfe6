"""Matmuls of other libraries against float64 arithmetic on their stored weight, and their refusals."""

from __future__ import annotations

import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from harness.core import IntWeight, round_to_nearest
from harness.kernels.bench.peers import PEERS, Peer, base, fbgemm, gemlite, int4pack

MODULES = {
    "gemlite": "gemlite",
    "torchao": "torchao",
    "bitsandbytes nf4": "bitsandbytes",
    "humming": "humming",
    "fbgemm": "fbgemm_gpu",
    "onnxruntime": "onnxruntime",
    "onnxruntime int8": "onnxruntime",
    "openvino": "openvino",
    "openvino int8": "openvino",
    "auto-round": "auto_round_kernel",
}
BY_NAME = {peer.name: peer for peer in PEERS}
# Relative to the norm of y. bfloat16 rounds the decoded weight and y, each by at most 2^-9; float32 rounds each of
# K = 1024 products and sums by 2^-24.
BOUNDS = {torch.bfloat16: 2**-8, torch.float32: 1024 * 2**-24}
INT8_BOUND = 0.02  # rounding normal inputs to int8 with a scale for each group adds about 0.6 %
DTYPES = {
    "torch int4pack": (torch.bfloat16,),
    "torchao": (torch.bfloat16,),
    "bitsandbytes nf4": (torch.bfloat16, torch.float32),
    "auto-round": (torch.bfloat16, torch.float32),
}
SPLIT_BOUND = 2**-7  # kernels that split K may add up to eight parts in bfloat16


def error(outputs: Tensor, expected: Tensor) -> float:
    return float((outputs.double() - expected).norm() / expected.norm())


def weights(rows: int, columns: int, device: str = "cpu") -> Tensor:
    """Rows and groups of 64 columns of different magnitudes, so that a wrong order is detected."""
    spread = torch.rand(rows, columns // 64, 1).mul(2).exp()
    return (torch.randn(rows, columns // 64, 64) * spread).view(rows, columns).mul(0.01).to(device)


def check(peer: Peer, weight: Tensor, dtype: torch.dtype, bound: float) -> None:
    """The matmul uses the weight that `decoded` returns, and that weight is the original at 4 bits."""
    call, decoded, nbytes = peer.build(weight, 128, dtype)
    stored = decoded()
    assert stored.dtype == torch.float64
    assert stored.shape == weight.shape
    assert 0 < error(stored, weight.double()) < 0.2  # 4 bits in groups lose about a tenth of normal values
    assert 0.5 < nbytes / weight.numel() < 0.6
    for rows in (1, 5, 40):
        inputs = torch.randn(rows, weight.shape[1], device=weight.device).to(dtype)
        outputs = call(inputs)
        assert outputs.dtype == dtype
        assert outputs.shape == (rows, weight.shape[0])
        assert error(outputs, inputs.double() @ stored.t()) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("peer", [peer for peer in PEERS if "cpu" in peer.devices], ids=lambda peer: peer.name)
def test_right_on_a_cpu(peer: Peer, dtype: torch.dtype) -> None:
    module = MODULES.get(peer.name, "torch")
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; the extra peers installs it")
    if dtype not in DTYPES.get(peer.name, (torch.float32,)):
        with pytest.raises(ValueError, match=f"does not support {dtype}; expected"):
            peer.build(weights(96, 1024), 128, dtype)
    else:
        check(peer, weights(96, 1024), dtype, INT8_BOUND if peer.rounds_inputs else BOUNDS[dtype])


@pytest.mark.parametrize("peer", [peer for peer in PEERS if "cpu" not in peer.devices], ids=lambda peer: peer.name)
def test_a_peer_for_gpus_refuses_a_cpu(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)  # whether or not the library is installed
    with pytest.raises(ValueError, match=rf"^{re.escape(peer.name)} does not run on cpu; expected cuda$"):
        peer.build(weights(256, 1024), 128, torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("peer", [peer for peer in PEERS if "cuda" in peer.devices], ids=lambda peer: peer.name)
def test_right_on_a_gpu(peer: Peer) -> None:
    module = MODULES.get(peer.name, "torch")
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed, and no extra of this project installs it")
    if peer.name == "fbgemm" and torch.cuda.get_device_capability() != (9, 0):
        with pytest.raises(ValueError, match="^fbgemm does not .* compute capability"):
            peer.build(weights(256, 1024, "cuda"), 128, torch.bfloat16)
    else:
        check(peer, weights(256, 1024, "cuda"), torch.bfloat16, SPLIT_BOUND)


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.name in MODULES], ids=lambda peer: peer.name)
def test_a_missing_library_is_named(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=MODULES[peer.name]) as raised:
        peer.build(weights(16, 128), 128, torch.bfloat16)
    assert raised.value.name == MODULES[peer.name]


def test_onnxruntime_takes_an_odd_number_of_groups() -> None:
    pytest.importorskip("onnxruntime")
    check(BY_NAME["onnxruntime"], weights(96, 640), torch.float32, BOUNDS[torch.float32])


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(PEERS)


def test_refusals_say_what_was_expected() -> None:
    build = BY_NAME["bitsandbytes nf4"].build
    with pytest.raises(ValueError, match=r"\(N, K\)=\(16, 96\); expected multiples of \(1, 64\)"):
        build(torch.zeros(16, 96), 128, torch.bfloat16)
    with pytest.raises(ValueError, match="does not support torch.float64; expected torch.float16 or"):
        build(torch.zeros(16, 64), 128, torch.float64)


def test_groups_are_checked() -> None:
    weight = torch.zeros(8, 96)
    with pytest.raises(ValueError, match="x does not support group_size=48; expected one of"):
        base.check_group("x", weight, 48, (32, 64))
    for wrong in (-1, 0, 64):
        with pytest.raises(ValueError, match=f"group_size={wrong}; expected a divisor of K=96"):
            base.check_group("x", weight, wrong)
    base.check_group("x", weight, 32, (32, 64))


def test_int4pack_parts_hold_the_weight() -> None:
    fmt = IntWeight(bits=4, granularity="group", group_size=64, scale_dtype="bfloat16")
    rounded = round_to_nearest(weights(24, 256), fmt)
    halves, pairs = int4pack.parts(rounded)
    assert halves.shape == (24, 128)
    assert pairs.shape == (4, 24, 2)
    assert torch.equal(halves[:, 0] >> 4, rounded.codes[:, 0])  # the even column is the upper half
    # (8 - zero point) * scale, at most 8 steps, is rounded to bfloat16 (2^-9); the error of a value is half a step
    assert error(int4pack.decoded_parts(halves, pairs), rounded.dequantize(torch.float64)) < 2**-8


@pytest.mark.parametrize("groups", [1, 4])
def test_gemlite_words_are_decoded(groups: int) -> None:
    codes, scale, zero = torch.randint(16, (24, 256)), torch.rand(24, groups), torch.rand(24, groups) * 15
    expected = ((codes.view(24, groups, -1) - zero[..., None]) * scale[..., None]).view(24, 256).double()
    words = sum(codes[:, place::8] << 4 * place for place in range(8))
    assert isinstance(words, Tensor)
    stored = -zero * scale if groups > 1 else zero
    layer = SimpleNamespace(
        W_q=words.to(torch.int32).t().contiguous(),
        scales=scale.t().contiguous(),
        zeros=stored.t().contiguous(),
        elements_per_sample=8,
        W_group_mode=4 if groups > 1 else 3,
    )
    assert error(gemlite.layer_weight(layer), expected) < 1e-6


def test_fbgemm_codes_are_decoded() -> None:
    codes, scale, zero = torch.randint(-8, 8, (6, 8), dtype=torch.int8), torch.rand(2, 6), torch.randn(2, 6)
    decoded = fbgemm.weight_of(codes, scale, zero)
    for row in range(6):
        for column in range(8):
            group = column // 4
            value = int(codes[row, column]) * float(scale[group, row]) + float(zero[group, row])
            assert decoded[row, column] == pytest.approx(value)


def test_unit_vectors_show_the_weight() -> None:
    weight = torch.randn(40, 1500)
    decoded = base.weight_from_unit_vectors(lambda units: units @ weight.t(), 1500, torch.float32, torch.device("cpu"))
    assert torch.equal(decoded, weight.double())
