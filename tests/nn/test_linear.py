"""QuantLinear: input quantization equals its formulas, packed equals simulated, and sizes are those of the storage."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.core import IntActivation, IntWeight, round_to_nearest
from harness.core.formats import InputQuantizer
from harness.kernels.native import library
from harness.nn import QuantLinear, stored_bytes
from harness.nn.described import Described


def naive_symmetric(values: Tensor, bits: int) -> Tensor:
    """Absmax quantization on the narrow grid, in float64; all values share a scale."""
    largest = 2 ** (bits - 1) - 1
    scale = values.double().abs().max() / largest
    return (values.double() / scale).round().clamp(-largest - 1, largest) * scale


def test_per_token_absmax() -> None:
    inputs = torch.randn(2, 5, 16) * torch.rand(2, 5, 1).mul(5).exp()
    out = InputQuantizer(IntActivation(bits=8, symmetric=True, grid="narrow"))(inputs)
    expected = torch.stack([naive_symmetric(row, 8) for row in inputs.view(-1, 16)]).view(2, 5, 16)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-7)


def test_per_tensor_has_one_scale_for_each_sequence_of_the_batch() -> None:
    inputs = torch.randn(3, 5, 16) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    quantizer = InputQuantizer(IntActivation(bits=8, symmetric=True, grid="narrow", granularity="tensor"))
    expected = torch.stack([naive_symmetric(sequence, 8) for sequence in inputs])
    torch.testing.assert_close(quantizer(inputs).double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(quantizer(inputs)[1], quantizer(inputs[1:2])[0])


def test_static_scale_comes_from_calibration_and_clips() -> None:
    fmt = IntActivation(bits=8, symmetric=True, grid="narrow", granularity="tensor", dynamic=False)
    out = InputQuantizer(fmt, (torch.tensor(-1.27), torch.tensor(0.5)))(torch.tensor([[0.018, -0.6, 9.0]]))
    torch.testing.assert_close(out, torch.tensor([[0.02, -0.60, 1.27]]))


def test_asymmetric_activations_use_both_ends() -> None:
    inputs = torch.rand(1, 4, 64) * 6  # all positive: the symmetric grid wastes its lower half
    asymmetric = InputQuantizer(IntActivation(bits=4, symmetric=False))(inputs)
    symmetric = InputQuantizer(IntActivation(bits=4, symmetric=True))(inputs)
    assert (asymmetric - inputs).norm() < 0.7 * (symmetric - inputs).norm()


def test_token_granularity_has_no_static_form() -> None:
    with pytest.raises(ValueError, match="dynamic=False has no meaning with granularity=token"):
        IntActivation(bits=8, granularity="token", dynamic=False)


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_clip_shrinks_the_range_of_the_grid(granularity: Any) -> None:
    inputs = torch.randn(3, 5, 16)
    fmt = IntActivation(bits=4, symmetric=True, grid="narrow", granularity=granularity, clip=0.7)
    quantizer = InputQuantizer(fmt)
    rows = inputs.view(-1, 16) if granularity == "token" else inputs.view(3, -1)
    expected = []
    for values in rows.double():
        scale = 0.7 * values.abs().max() / 7
        expected.append((values / scale).round().clamp(-8, 7) * scale)
    outputs = quantizer(inputs)
    torch.testing.assert_close(outputs.double(), torch.stack(expected).view(inputs.shape), rtol=1e-5, atol=1e-7)
    codes, scale = quantizer.encode(inputs)
    torch.testing.assert_close(codes * scale, outputs)
    assert int(codes.max()) == 7
    assert float(outputs.abs().max()) < 0.9 * float(inputs.abs().max())


def test_a_clipped_asymmetric_range_shrinks_at_both_ends() -> None:
    inputs = torch.tensor([[-4.0, -1.0, 0.5, 8.0]])
    outputs = InputQuantizer(IntActivation(bits=8, clip=0.5))(inputs)
    torch.testing.assert_close(outputs, torch.tensor([[-2.0, -1.0, 0.5, 4.0]]), rtol=0, atol=0.02)


def test_a_clipped_static_range_is_a_fraction_of_the_calibrated_range() -> None:
    fmt = IntActivation(bits=8, symmetric=True, grid="narrow", granularity="tensor", dynamic=False, clip=0.5)
    quantizer = InputQuantizer(fmt, (torch.tensor(-2.54), torch.tensor(0.5)))
    torch.testing.assert_close(quantizer.scale, torch.tensor(0.01))
    torch.testing.assert_close(quantizer(torch.tensor([[0.018, -0.6, 9.0]])), torch.tensor([[0.02, -0.60, 1.27]]))


@pytest.mark.parametrize("clip", [0.0, -0.5, 1.1])
def test_a_clip_outside_0_to_1_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match=f"clip={clip} is out of range; expected a share of the range above 0, up to"):
        IntActivation(bits=8, clip=clip)


def test_a_weight_kernel_gets_quantized_inputs() -> None:
    fmt = IntWeight(bits=4, symmetric=True, granularity="group", group_size=64)
    input_quantizer = InputQuantizer(IntActivation(bits=4, symmetric=True, grid="narrow", clip=0.9))
    quantized = round_to_nearest(torch.randn(64, 128), fmt)
    packed = QuantLinear(quantized, None, torch.bfloat16, input_quantizer).pack()
    inputs = torch.randn(3, 5, 128).bfloat16()
    assert packed.kernel == ("native_int4" if library.available() else "cpu_w4a16")
    expected = input_quantizer(inputs).double() @ quantized.dequantize().double().T
    assert (packed(inputs) - expected).norm() < 0.02 * expected.norm()
    assert (packed(inputs) - inputs.double() @ quantized.dequantize().double().T).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize(("bits", "dtype"), list(itertools.product((2, 3, 4, 8), (torch.float32, torch.bfloat16))))
def test_packed_equals_simulated_equals_decoded(bits: int, dtype: torch.dtype) -> None:
    fmt = IntWeight(bits=bits, granularity="group", group_size=8)
    weight, bias, inputs = torch.randn(7, 24) * 0.1, torch.randn(7).to(dtype), torch.randn(2, 3, 24).to(dtype)
    quantized = round_to_nearest(weight, fmt)
    packed = QuantLinear(quantized, bias, dtype).pack()
    simulated = QuantLinear(quantized, bias, dtype).simulate()
    assert packed.kernel == "reference"
    assert torch.equal(packed(inputs), simulated(inputs))
    assert torch.equal(packed(inputs), F.linear(inputs, quantized.dequantize(dtype), bias))
    assert packed.decoded is None
    assert sum(buffer.nbytes for buffer in packed.buffers()) == quantized.stored_bits // 8 + bias.nbytes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_decoding_in_slabs_gives_the_same_as_at_once(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = round_to_nearest(torch.randn(43, 24) * torch.rand(43, 1), IntWeight(bits=bits, granularity="channel"))
    whole, inputs, bias = quantized.dequantize(), torch.randn(2, 3, 24), torch.randn(43)
    monkeypatch.setattr("harness.core.formats.qtensor._SLAB_VALUES", 24 * 17)  # slabs of 16 rows, the last shorter
    assert torch.equal(quantized.dequantize(), whole)
    torch.testing.assert_close(quantized.linear(inputs, bias), F.linear(inputs, whole, bias))


def test_stored_bytes_counts_packed_bits_and_tied_weights_once() -> None:
    quantized = round_to_nearest(torch.randn(16, 32), IntWeight(bits=3))
    embedding, head = nn.Embedding(10, 16), nn.Linear(16, 10, bias=False)
    head.weight = embedding.weight
    for keep in (QuantLinear.pack, QuantLinear.simulate):
        model = nn.ModuleList([embedding, head, keep(QuantLinear(quantized, None, torch.float32))])
        assert stored_bytes(model) == 10 * 16 * 4 + (16 * 32 * 3 + 16 * 19) // 8


def test_the_weight_of_a_quantized_linear_has_a_description_and_no_values() -> None:
    weight = Described((3, 4), torch.float16, torch.device("cpu"))
    assert (tuple(weight.shape), weight.dtype, weight.device.type) == ((3, 4), torch.float16, "cpu")
    for read in (lambda: weight.t(), lambda: weight.float(), lambda: weight.data, lambda: weight.sum()):
        with pytest.raises(ValueError, match="reads the float weight of a quantized linear; add the linear to skip"):
            read()
