"""Distillation: gradients are those of the whole model, the held-out loss falls, codes stay, and bits are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.calibration import Stream, after_blocks, backward
from harness.config import build_run
from harness.core import Distillation, FloatWeight, IntWeight, LearnedWeight, round_to_nearest
from harness.core.formats import PermutedQTensor
from harness.models import Decoder
from harness.nn import QuantLinear
from harness.quantization.distill import distill
from harness.quantization.passes import Pass
from harness.quantization.result import Result
from harness.quantization.teacher import teacher_of
from harness.utils.progress import silent
from tests.conftest import resolve
from tests.support.decoders import quantize
from tests.support.families import build

pytestmark = pytest.mark.usefixtures("torch_kernels")
Tiny = Callable[..., dict[str, Any]]
TOKENS = torch.randint(3, 128, (9, 16), generator=torch.Generator().manual_seed(5))
FORMATS = {
    "integer": IntWeight(bits=3, granularity="group", group_size=8),
    "float_zero": IntWeight(bits=3, granularity="group", group_size=8, zero_point="float"),
    "symmetric": IntWeight(bits=4, symmetric=True),
    "tensor": IntWeight(bits=8, granularity="tensor"),
    "fp8_block": FloatWeight(element="e4m3", granularity="block", group_size=10),
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_gradients_in_the_memory_of_one_block_are_those_of_the_model(family: str) -> None:
    model: Any = build(family)
    decoder, tokens = Decoder(model), TOKENS[:3]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    target = torch.randn(3, 16, 128, generator=torch.Generator().manual_seed(0))
    loss = F.mse_loss(model(input_ids=tokens).logits, target)
    weights = [module.weight for module in decoder.linears().values()]
    expected = torch.autograd.grad(loss, weights)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    stream, tail = Stream(decoder, tokens), after_blocks(decoder, tokens)

    def head(states: Tensor) -> tuple[float, Tensor]:
        last = states.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.mse_loss(torch.stack([tail(each) for each in last]), target)
        return loss.item(), torch.autograd.grad(loss, last)[0]

    found, _ = backward(stream, torch.cat(stream.states), head)
    assert found == pytest.approx(float(loss.detach()), rel=1e-5)
    for weight, slope in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_tuner_decodes_what_is_stored_and_stores_what_it_has(name: str, permuted: bool) -> None:
    fmt = FORMATS[name]
    stored: Any = round_to_nearest(torch.randn(20, 40, generator=torch.Generator().manual_seed(1)), fmt)
    codes, bits = stored.codes.clone(), stored.stored_bits
    qtensor = PermutedQTensor(stored, torch.randperm(40)) if permuted else stored
    tuner = qtensor.tuner()
    assert tuner is not None
    assert set(tuner.values) == ({"scale", "zero_point"} if name == "float_zero" else {"scale"})
    torch.testing.assert_close(tuner.weight(tuner.values), qtensor.dequantize(), rtol=1e-6, atol=0)
    values = {key: (value * 1.25).requires_grad_() for key, value in tuner.values.items()}
    moved = tuner.weight(values)
    slopes = torch.autograd.grad(moved.square().sum(), list(values.values()))
    assert all(slope.abs().max() > 0 for slope in slopes)
    tuner.accept({key: value.detach() for key, value in values.items()})
    torch.testing.assert_close(qtensor.dequantize(), moved.detach(), rtol=2e-3, atol=4e-3)  # float16
    assert torch.equal(stored.codes, codes)
    assert stored.stored_bits == bits


def test_levels_that_pass_one_another_are_sorted_with_their_codes() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    stored: Any = round_to_nearest(weight, LearnedWeight(levels="learned", bits=2))
    tuner = stored.tuner()
    assert torch.equal(tuner.weight(tuner.values), stored.dequantize())
    values = {"levels": tuner.values["levels"].flip(1).clone().requires_grad_()}
    moved = tuner.weight(values)
    (slope,) = torch.autograd.grad(moved.sum(), list(values.values()))
    assert torch.equal(slope.sum(1), torch.full((6,), 40.0))
    tuner.accept({"levels": values["levels"].detach()})
    assert torch.equal(stored.dequantize(), moved.detach())
    assert torch.equal(stored.levels, stored.levels.sort(1).values)


def test_scales_that_are_powers_of_two_or_bytes_do_not_move() -> None:
    for scale_dtype in ("e8m0", "e4m3"):
        fmt = FloatWeight(element="e2m1", granularity="group", group_size=8, scale_dtype=scale_dtype)
        assert round_to_nearest(torch.randn(8, 16), fmt).tuner() is None


def rounded(tiny: Tiny, *overrides: str) -> tuple[Any, Decoder, Any]:
    """A tiny model with rounded linears that are not converted yet, its decoder, and its teacher."""
    model: Any = build("llama")
    decoder = Decoder(model)
    teacher = teacher_of(decoder, TOKENS)
    cfg = build_run(tiny("method=distill", *overrides))
    passed = Pass(decoder, cfg, "distill", list(decoder.linears()), Result(), {}, {})
    passed.at_once(silent)
    return model, decoder, teacher


def weights_of(model: Any) -> list[Tensor]:
    return [module.packed.dequantize() for module in model.modules() if isinstance(module, QuantLinear)]  # type: ignore[union-attr,operator]


def norms_of(decoder: Decoder) -> list[Tensor]:
    return [each for block in decoder.blocks for each in block.parameters() if each.dim() == 1]


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("scheme", ["group32", "channel", "w4a4_token"])
def test_the_held_out_loss_falls_and_the_model_has_it(tiny: Tiny, scheme: str, bfloat16: bool) -> None:
    width = ("bits=3",) if scheme in ("group32", "channel") else ()
    model, decoder, teacher = rounded(tiny, f"scheme={scheme}", *width)
    outcome = distill(decoder, TOKENS, teacher, Distillation(epochs=6, lr=0.02, batch=2, bfloat16=bfloat16))
    assert outcome is not None
    assert outcome.after < outcome.before
    held_out, float_model = TOKENS[[7]], build("llama")
    with torch.no_grad():
        exact, actual = (F.log_softmax(each(input_ids=held_out).logits, -1) for each in (float_model, model))
    kl = float(F.kl_div(actual, exact, reduction="sum", log_target=True)) / held_out.numel()
    assert kl == pytest.approx(outcome.after, rel=0.2 if bfloat16 else 1e-2)


def test_training_that_does_not_help_is_undone(tiny: Tiny) -> None:
    model, decoder, teacher = rounded(tiny, "scheme=channel", "bits=4")
    before, norms = weights_of(model), [each.clone() for each in norms_of(decoder)]
    outcome = distill(decoder, TOKENS, teacher, Distillation(epochs=2, lr=30.0, batch=4, bfloat16=False))
    assert outcome is not None
    assert outcome.after == outcome.before
    assert all(map(torch.equal, before, weights_of(model)))
    assert all(map(torch.equal, norms, norms_of(decoder)))


def test_norms_are_trained_too(tiny: Tiny) -> None:
    _, decoder, teacher = rounded(tiny, "scheme=w_mxfp4")  # whose scales do not move
    before = [each.clone() for each in norms_of(decoder)]
    outcome = distill(decoder, TOKENS, teacher, Distillation(epochs=6, lr=0.02, batch=2, bfloat16=False))
    assert outcome is not None
    assert outcome.after < outcome.before
    assert not any(map(torch.equal, before, norms_of(decoder)))
    assert not any(each.grad is not None for each in norms_of(decoder))


@pytest.mark.parametrize("method", ["distill", "gptq_distill", "autoround_distill", "qat", "gptq_qat", "autoround_qat"])
def test_a_composite_trains_what_it_quantized(tiny: Tiny, method: str) -> None:
    cfg = build_run(tiny(f"method={method}", "scheme=channel", "bits=3", "execution=packed"))
    model = build("llama")
    result = quantize(model, cfg, TOKENS)
    assert result.distilled is not None
    assert result.distilled.after <= result.distilled.before
    assert len(result.layers) == 14
    assert all("weight_error" not in row and row["bits_per_weight"] > 3 for row in result.layers)
    assert result.kernels
    assert result.total_weight_error is None


def test_distill_comes_last() -> None:
    raw = resolve("method=gptq_distill")
    steps = raw["method"]
    raw["method"] = {name: steps[name] for name in ("distill", "gptq")}
    with pytest.raises(ValueError, match="step distill has nothing to do"):
        build_run(raw)


def test_rounding_needs_a_format_of_weights(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="^method.distill: scheme=none leaves the format of weights to the method"):
        quantize(build("llama"), build_run(tiny("method=distill", "scheme=none")), TOKENS)


def test_training_weights_too_reaches_further_than_scales_alone(tiny: Tiny) -> None:
    losses = []
    for method in ("distill", "qat"):
        raw = tiny(
            f"method={method}", "scheme=channel", "bits=3", f"method.{method}.epochs=8", f"method.{method}.lr=0.01"
        )
        result = quantize(build("llama"), build_run(raw), TOKENS)
        assert result.distilled is not None
        losses.append(result.distilled)
    assert losses[0].before == pytest.approx(losses[1].before, rel=0.05)
    assert losses[1].after < 0.9 * losses[0].after


def test_weights_without_rounding_are_refused(tiny: Tiny) -> None:
    raw = tiny("method=qat", "scheme=none")
    raw["method"] = resolve("method=quip_sharp")["method"] | raw["method"]
    with pytest.raises(ValueError, match="weights cannot be trained as .*; use distill"):
        quantize(build("llama"), build_run(raw), TOKENS)
