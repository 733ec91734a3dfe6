"""Trained rotations: gradients are those of the whole model, steps stay orthogonal, and the function stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.calibration import Stream
from harness.config import build_run
from harness.core import IntActivation, Residual, Rotation
from harness.core.formats import InputQuantizer
from harness.models import Decoder, weight_of
from harness.nn import standing_in
from harness.quantization.residual_stream import discover
from harness.quantization.rotation import Cayley, _Task, _turned, orthogonal, train_rotation
from harness.quantization.teacher import Teacher, teacher_of
from methods.rotate import random_orthogonal
from methods.spinquant import SpinQuant
from tests.support.blocks import logits, relative
from tests.support.decoders import quantize
from tests.support.families import build, uneven

pytestmark = [
    pytest.mark.usefixtures("torch_kernels"),
    pytest.mark.filterwarnings("ignore:.* shared its weight with"),
]
Tiny = Callable[..., dict[str, Any]]
TOKENS = torch.randint(3, 128, (9, 16), generator=torch.Generator().manual_seed(5))
FOUR_BITS = InputQuantizer(IntActivation(bits=4, symmetric=True, grid="narrow"))
FAMILIES = {"llama": {}, "gpt2": {}, "opt": {"do_layer_norm_before": True, "word_embed_proj_dim": 32}}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def folded(family: str) -> tuple[Any, Decoder, Residual]:
    model: Any = uneven(build(family, **FAMILIES[family]))
    residual = discover(Decoder(model), TOKENS[:1])
    residual.fold()
    return model, Decoder(model), residual


def whole(model: Any, decoder: Decoder, residual: Residual, Q: Tensor) -> Tensor:
    """Log-probabilities by the model itself, whose embeddings and linears are turned one by one."""
    readers = {port.module for port in residual.readers}
    writers = {port.module for port in residual.writers}

    def turned(linear: Any, rounded: bool) -> Callable[[Tensor], Tensor]:
        weight = weight_of(linear) @ Q if linear in readers else weight_of(linear)
        bias = getattr(linear, "bias", None)
        if linear in writers:
            weight, bias = Q.T @ weight, bias if bias is None else bias @ Q

        def forward(inputs: Tensor) -> Tensor:
            values = inputs + (FOUR_BITS(inputs.detach()) - inputs.detach()) if rounded else inputs
            return F.linear(values, weight, bias)

        return forward

    inside = set(decoder.linears().values())
    tables = {table.module: table for table in residual.tables}
    forwards: dict[nn.Module, Any] = {each: turned(each, each in inside) for each in (readers | writers | inside)}
    forwards |= {each: (lambda tokens, each=each: F.embedding(tokens, each.weight @ Q)) for each in tables}
    with ExitStack() as stack:
        for module, forward in forwards.items():
            stack.enter_context(standing_in(module, forward))
        return F.log_softmax(model(input_ids=TOKENS[:2]).logits, -1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gradient_is_that_of_the_whole_model(family: str) -> None:
    model, decoder, residual = folded(family)
    teacher = teacher_of(decoder, TOKENS[:2])
    teacher = Teacher([states.flip(1) for states in teacher.states], teacher.tail)
    expected = F.log_softmax(torch.stack([teacher.tail(states[0]) for states in teacher.states]), -1)
    Q = random_orthogonal(residual.width, torch.Generator().manual_seed(0)).float().contiguous().requires_grad_()
    with torch.enable_grad():
        actual = whole(model, decoder, residual, Q)
        loss = F.kl_div(actual, expected, reduction="sum", log_target=True) / expected[..., 0].numel()
    (slope,) = torch.autograd.grad(loss, Q)
    task = _Task(Q, residual, Stream(decoder, TOKENS[:2]), teacher, bfloat16=False)
    quantizers = dict.fromkeys(decoder.linears(), FOUR_BITS)
    with _turned(decoder, residual, Q, quantizers), torch.enable_grad():
        task.differentiate([0, 1])
        assert task.error([0, 1]) == pytest.approx(float(loss.detach()), rel=2e-2)
    assert Q.grad is not None
    turns = [each @ Q.detach().T for each in (Q.grad, slope)]  # along the orthogonal matrices, the skew parts
    found, exact = (each - each.T for each in turns)
    assert relative(found, exact) < 0.05  # values between two codes may go to either


def test_steps_stay_orthogonal_and_descend() -> None:
    """The nearest rotation to a matrix M: min |Q - M|^2 has the polar factor of M as its solution."""
    M = random_orthogonal(12, torch.Generator().manual_seed(1)).float()
    M = M if torch.linalg.det(M) > 0 else M[[1, 0, *range(2, 12)]]  # reachable from the identity
    Q = torch.eye(12).requires_grad_()
    steps = Cayley(Q, 1.5, 300)
    for _ in range(300):
        steps.take(lambda: (Q - M).square().sum().backward())
    assert relative(Q.detach() @ Q.detach().T, torch.eye(12)) < 1e-5
    assert relative(Q.detach(), M) < 0.05


def test_the_nearest_orthogonal_matrix() -> None:
    Q = random_orthogonal(12, torch.Generator().manual_seed(1))
    assert relative(orthogonal(Q + 1e-4 * torch.randn(12, 12, dtype=torch.float64)), Q) < 1e-3
    found = orthogonal(torch.randn(12, 12, dtype=torch.float64))
    assert relative(found @ found.T, torch.eye(12, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss_and_keeps_the_function(family: str) -> None:
    model, decoder, residual = folded(family)
    before, weights = logits(model), [weight_of(each).clone() for each in decoder.linears().values()]
    quantizers = dict.fromkeys(decoder.linears(), FOUR_BITS)
    outcome = train_rotation(decoder, residual, TOKENS, quantizers, Rotation(epochs=8, lr=1.5, batch=2, bfloat16=False))
    assert outcome.after < outcome.before
    assert relative(logits(model), before) < 1e-5
    assert not all(map(torch.equal, weights, (weight_of(each) for each in decoder.linears().values())))


def test_the_record_has_the_loss_and_gptq_quantizes_what_was_turned(tiny: Tiny) -> None:
    raw = tiny("method=spinquant_gptq", "scheme=w4a4_token", "method.spinquant.epochs=3", "execution=packed")
    result = quantize(build("llama"), build_run(raw), TOKENS)
    assert result.rotated is not None
    assert result.rotated.after <= result.rotated.before
    assert len(result.layers) == 14


@pytest.mark.parametrize("scheme", ["group64", "w8a8_static"])
def test_a_scheme_without_ranges_of_inputs_at_run_time_is_refused(tiny: Tiny, scheme: str) -> None:
    with pytest.raises(ValueError, match=f"^method.spinquant: scheme={scheme} does not round inputs .* use rotate"):
        quantize(build("llama"), build_run(tiny("method=spinquant", f"scheme={scheme}")), TOKENS)


def test_it_reads_calibration_data(tiny: Tiny) -> None:
    assert build_run(tiny("method=spinquant", "scheme=w4a4_token")).calibrates
    with pytest.raises(ValueError, match="lr=0"):
        SpinQuant(lr=0.0)
