"""The contract between the harness and a method, for every file in conf/method: a new YAML needs no new test.

Each pair of a method and a scheme is either served, and then the contract is tested on it, or refused, and then the
refusal is tested.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.config import build, build_steps
from harness.core import (
    Block,
    FloatWeight,
    Hessian,
    IntActivation,
    IntQTensor,
    IntWeight,
    LearnedWeight,
    LevelsWeight,
    Method,
    MinMax,
    QTensor,
    Scheme,
    Stats,
    chooses,
    overrides,
    round_to_nearest,
)
from harness.kernels.base import Kernel
from harness.nn import QuantLinear
from tests.conftest import ROOT, resolve

NO_CHOICE = ("none", "checkpoint", "distill", "qat")  # nothing is quantized, or by rounding alone
TRAINED = ("_distill", "_qat")  # the codes are those of the step before
FILES = sorted(path.stem for path in (ROOT / "conf/method").glob("*.yaml"))
METHODS = [name for name in FILES if name not in NO_CHOICE and not name.endswith(TRAINED)]
COMPOSITES = [name for name in METHODS if "_target_:" not in (ROOT / f"conf/method/{name}.yaml").read_text()]
INT8_TOKENS = IntActivation(bits=8, symmetric=True, grid="narrow", threshold=6.0)
SCHEMES = {
    "channel": Scheme(name="channel", weight=IntWeight(bits=4)),
    "group": Scheme(name="group", weight=IntWeight(bits=3, granularity="group", group_size=16)),
    "float_zero": Scheme(
        name="float_zero", weight=IntWeight(bits=3, granularity="group", group_size=16, zero_point="float")
    ),
    "symmetric": Scheme(name="symmetric", weight=IntWeight(bits=4, symmetric=True, grid="narrow")),
    "tensor": Scheme(name="tensor", weight=IntWeight(bits=8, granularity="tensor")),
    "llm_int8": Scheme(
        name="llm_int8", weight=IntWeight(bits=8, symmetric=True, grid="narrow"), activation=INT8_TOKENS
    ),
    "mxfp4": Scheme(
        name="mxfp4", weight=FloatWeight(element="e2m1", granularity="group", group_size=32, scale_dtype="e8m0")
    ),
    "nvfp4": Scheme(
        name="nvfp4",
        weight=FloatWeight(element="e2m1", granularity="group", group_size=16, scale_dtype="e4m3", tensor_scale=True),
    ),
    "fp8_block": Scheme(name="fp8_block", weight=FloatWeight(element="e4m3", granularity="block", group_size=20)),
    "nf4": Scheme(name="nf4", weight=LevelsWeight(table="nf4", granularity="flat", group_size=64, double_quant=True)),
    "fp4": Scheme(name="fp4", weight=LevelsWeight(table="fp4", granularity="flat", group_size=64)),
    "lloyd_max": Scheme(name="lloyd_max", weight=LevelsWeight(table="lloyd_max", bits=3, group_size=16)),
    "learned": Scheme(name="learned", weight=LearnedWeight(levels="learned", bits=3, levels_dtype="float32")),
    "learned_group64": Scheme(
        name="learned_group64",
        weight=LearnedWeight(
            levels="learned", bits=3, granularity="group", group_size=16, levels_dtype="float32", scale_dtype="float32"
        ),
    ),
    "none": Scheme(name="none", weight=None),
}
FORMATS = {name for name, scheme in SCHEMES.items() if scheme.weight is not None}
INTEGERS = {name for name in FORMATS if isinstance(SCHEMES[name].weight, IntWeight)}
# The schemes that methods with a `check` of their own serve. All other methods serve every scheme but `none`.
SERVED_BY = {
    "any4": {"learned_group64"},
    "aqlm": {"none"},
    "bnb_fp4": {"fp4"},
    "bnb_int8": {"llm_int8"},
    "bnb_nf4": {"nf4"},
    "fp4": {"fp4"},
    "hqq": {"channel", "group", "float_zero", "tensor"},
    "llm_int8": {"llm_int8"},
    "lnq": {"learned"},
    "nf4": {"nf4"},
    "qtip": {"none"},
    "quip_sharp": {"none"},
}
HOOKS = ("prepare", "rotate", "transform", "adjust", "quantize", "quantize_block")
FLOAT16 = ("salient", "bnb_int8")  # methods that store weights, or scales of their own, as float16
ROWS, COLUMNS, TOKENS = 32, 64, 200


@functools.cache
def steps(method: str) -> dict[str, Method]:
    return build_steps(resolve(f"method={method}")["method"])


def quantizer(method: str) -> Method:
    """The step that chooses the codes: the last one that does not round, or any step if all do."""
    *_, last = sorted(steps(method).values(), key=chooses)
    return last


def quantized(step: Method, weight: Tensor, scheme: Scheme, inputs: Tensor) -> QTensor:
    """The weight by the hook that the step overrides; a block has this linear alone, and two sequences."""
    stats = Stats(step.needs, weight.shape[1])
    stats.update(inputs)
    weight = step.adjust(weight, scheme, stats)
    if not overrides(step, "quantize_block"):
        return step.quantize(weight, scheme, stats)
    states = [part[None] for part in inputs.chunk(2)]
    targets = [F.linear(each, weight) for each in states]
    run = lambda weights, states: F.linear(states, weights["linear"])  # noqa: E731
    block = Block({"linear": weight}, {"linear": scheme}, {"linear": stats}, states, states, targets, run)
    return step.quantize_block(block)["linear"]


def refusal(method: str, scheme: Scheme) -> str | None:
    """The message with which a step of the method refuses the scheme; None if all steps serve it."""
    try:
        for step in steps(method).values():
            step.check(scheme)
    except ValueError as error:
        return str(error)
    return None


PAIRS = [(method, scheme) for method in METHODS for scheme in SCHEMES]
REFUSED = [pair for pair in PAIRS if refusal(pair[0], SCHEMES[pair[1]])]
SERVED = [pair for pair in PAIRS if pair not in REFUSED]
# Pairs whose codes are those of the format that the scheme describes. Peers have grids of their own.
ON_THE_GRID = [
    (method, scheme)
    for method, scheme in SERVED
    if scheme in FORMATS and not type(quantizer(method)).__module__.startswith("methods.peers.")
]


def inputs() -> Tensor:
    """Correlated inputs with a few large channels, like those of a transformer."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.rand(COLUMNS, generator=generator).mul(3).exp()
    return torch.randn(TOKENS, COLUMNS, generator=generator) @ mix


def weights() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(4)) * 0.05


def run(method: str, weight: Tensor, scheme: str) -> QTensor:
    return quantized(quantizer(method), weight, SCHEMES[scheme], inputs())


@pytest.mark.parametrize("method", [*(name for name in METHODS if name not in COMPOSITES), "distill", "qat"])
def test_yaml_equals_the_dataclass_defaults(method: str) -> None:
    raw: dict[str, Any] = resolve(f"method={method}")["method"]
    for name, step in steps(method).items():
        written = {key: value for key, value in raw[name].items() if key != "_target_"}
        defaults = {
            item.name: item.default_factory() if callable(item.default_factory) else item.default
            for item in dataclasses.fields(step)
        }
        assert written == defaults, f"conf/method/{method}.yaml and {type(step).__name__} differ"
        assert step.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", [name for name in FILES if name.endswith(TRAINED)])
def test_what_is_trained_was_quantized_by_the_step_before(method: str) -> None:
    before, _, last = method.rpartition("_")
    assert steps(method) == {**steps(before), **steps(last)}
    assert resolve(f"method={method}")["scheme"] == resolve(f"method={before}")["scheme"]


@pytest.mark.parametrize("method", [*METHODS, "distill", "qat"])
def test_module_docstring_names_paper_and_differences(method: str) -> None:
    for step in steps(method).values():
        doc = importlib.import_module(type(step).__module__).__doc__ or ""
        assert re.search(r"^Paper: .*", doc, re.MULTILINE), type(step).__module__
        assert re.search(r"^Differs: .*", doc, re.MULTILINE), type(step).__module__


@pytest.mark.parametrize("method", METHODS)
def test_serves_its_schemes_and_the_one_that_its_yaml_chooses(method: str) -> None:
    served = {scheme for name, scheme in SERVED if name == method}
    if any(overrides(step, "check") for step in steps(method).values()):
        assert served == SERVED_BY.get(method, served)
    else:
        assert served == FORMATS
    assert served
    assert refusal(method, build(Scheme, resolve(f"method={method}")["scheme"], "scheme")) is None


@pytest.mark.parametrize(("method", "scheme"), REFUSED)
def test_a_refusal_is_one_line_whose_remedy_is_served(method: str, scheme: str) -> None:
    message = refusal(method, SCHEMES[scheme])
    assert message is not None
    assert re.match(rf"^scheme={scheme} .*\buse .*\bscheme=\w+$", message), message
    remedy = message.rpartition("scheme=")[2]
    assert refusal(method, build(Scheme, resolve(f"scheme={remedy}")["scheme"], "scheme")) is None


@pytest.mark.parametrize(("method", "scheme"), SERVED)
def test_codes_shapes_and_determinism(method: str, scheme: str) -> None:
    weight = weights()
    before = weight.clone()
    first, second = run(method, weight, scheme), run(method, weight, scheme)
    assert torch.equal(weight, before), "quantize must not change the weight"
    assert first.shape == (ROWS, COLUMNS)
    assert first.dequantize().shape == (ROWS, COLUMNS)
    assert first.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(first.dequantize(), second.dequantize())
    if isinstance(first, IntQTensor):
        assert int(first.codes.max()) <= SCHEMES[scheme].weight.max_code
        assert first.scale.shape == SCHEMES[scheme].weight.groups((ROWS, COLUMNS))


@pytest.mark.parametrize("kind", ["zero", "constant", "outlier", "tiny"])
@pytest.mark.parametrize(("method", "scheme"), SERVED)
def test_degenerate_weights_stay_finite(method: str, kind: str, scheme: str) -> None:
    weight = {
        "zero": torch.zeros(ROWS, COLUMNS),
        "constant": torch.full((ROWS, COLUMNS), 0.3),
        "outlier": torch.eye(ROWS, COLUMNS) * 100 + weights(),
        "tiny": weights() * 1e-8,
    }[kind]
    if kind == "tiny" and (((method, scheme) in ON_THE_GRID and scheme in INTEGERS) or method in FLOAT16):
        with pytest.raises(
            ValueError, match=r"^scheme\.weight\.scale_dtype=float16 cannot hold .*=float32$|float16's range"
        ):
            run(method, weight, scheme)
    else:
        assert torch.isfinite(run(method, weight, scheme).dequantize()).all()


@pytest.mark.parametrize(("method", "scheme"), [pair for pair in SERVED if pair[0] not in FLOAT16])
def test_tiny_weights_are_not_lost(method: str, scheme: str) -> None:
    """The remedy of the refusal works: tiny weights have the error of others."""
    wide = SCHEMES[scheme].weight
    if isinstance(wide, IntWeight):
        wide = dataclasses.replace(wide, scale_dtype="float32")
    errors = []
    for factor in (1, 2.0**-27):
        weight = weights() * factor
        decoded = quantized(
            quantizer(method), weight, dataclasses.replace(SCHEMES[scheme], weight=wide), inputs()
        ).dequantize()
        errors.append(float((decoded - weight).norm() / weight.norm()))
    assert errors[1] < 1.1 * errors[0] + 0.01  # float16 codebooks and row scales lose up to 1 %


@pytest.mark.parametrize(("method", "scheme"), SERVED)
def test_silent_inputs_keep_their_weights(method: str, scheme: str) -> None:
    """Inputs that are zero on the calibration tokens may fire later: their weights are about as exact as the others."""
    silent = [3, 20, 21, 22, 50]
    X, weight = inputs(), weights()
    X[:, silent] = 0
    step = quantizer(method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decoded = quantized(step, weight, SCHEMES[scheme], X).dequantize()
    error = (decoded - weight).square()
    others = [i for i in range(COLUMNS) if i not in silent]
    assert error[:, silent].mean() <= 2 * error[:, others].mean()
    counted = [
        str(item.message) for item in caught if str(item.message).startswith(f"{len(silent)} of {COLUMNS} input")
    ]
    assert len(counted) == (Hessian in step.needs)


@pytest.mark.parametrize("method", METHODS)
def test_nan_raises(method: str) -> None:
    weight = weights()
    weight[2, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        run(method, weight, next(scheme for name, scheme in SERVED if name == method))


@pytest.mark.parametrize(
    ("method", "scheme"), [pair for pair in ON_THE_GRID if not overrides(quantizer(pair[0]), "adjust")]
)
def test_error_is_no_worse_than_rtn(method: str, scheme: str) -> None:
    """The error of the output, |X (W' - W)^T|; of the weight, mean |W' - W|, for a method that needs no inputs."""
    W, X = weights(), inputs()
    rounded = round_to_nearest(W, SCHEMES[scheme].weight).dequantize()
    quantized = run(method, W, scheme).dequantize()
    if quantizer(method).needs or overrides(quantizer(method), "quantize_block"):
        assert (X @ (quantized - W).T).norm() <= (X @ (rounded - W).T).norm() * 1.001
    else:
        assert (quantized - W).abs().mean() <= (rounded - W).abs().mean() * 1.001


@pytest.mark.parametrize(("method", "scheme"), SERVED)
def test_packed_equals_dequantized_execution(method: str, scheme: str) -> None:
    quantized, X = run(method, weights(), scheme), inputs() / 40  # some channels above the threshold, some below
    packed = QuantLinear(quantized, None, torch.float32).pack()
    expected = X @ quantized.dequantize().T
    if quantized.quantizes_inputs:
        assert (packed(X) - expected).norm() <= 0.02 * expected.norm()
    else:
        torch.testing.assert_close(packed(X), expected)
    if not isinstance(packed.packed, Kernel):  # a kernel has a layout of its own
        assert sum(buffer.nbytes for buffer in packed.buffers()) * 8 == quantized.stored_bits


def test_hooks_default_to_nothing_and_an_uncollected_statistic_says_so() -> None:
    assert not any(overrides(Method, hook) for hook in HOOKS)
    with pytest.raises(KeyError, match="MinMax was not collected; add it to the method's `needs`"):
        Stats()[MinMax]
