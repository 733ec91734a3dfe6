"""The engine: the inputs that a method receives, their order, and the methods that are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from harness.config import RunConfig, build_run
from harness.core import InputGroup, Method, MinMax, QTensor, Residual, Scheme, Stat, Stats, round_to_nearest
from harness.models import weight_of
from harness.nn import QuantLinear
from methods.rtn import RTN
from tests.support.blocks import Block, codes_of, logits, relative
from tests.support.decoders import linears, quantize
from tests.support.families import build, uneven

pytestmark = pytest.mark.usefixtures("torch_kernels")

Tiny = Callable[..., dict[str, Any]]
TOKENS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(5))


class Rows(Stat):
    """Stores all inputs of a linear; a streamed statistic must receive exactly these."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.rows = torch.zeros(0, in_features)

    def update(self, inputs: Tensor, reference: Tensor) -> None:
        self.rows = torch.cat([self.rows, inputs])


@dataclass(frozen=True, kw_only=True)
class Recorder(Method):
    """Records the groups and the inputs that it receives."""

    needs: ClassVar = (Rows,)
    groups: list[tuple[str, ...]]
    inputs: list[Tensor]

    def transform(self, group: InputGroup, stats: Stats) -> None:
        self.groups.append(tuple(name.rpartition(".")[2] for name in group.linears))

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        self.inputs.append(stats[Rows].rows)
        return round_to_nearest(weight, scheme.weight)


@dataclass(frozen=True, kw_only=True)
class SwapChannels(Method):
    """Permutes the hidden channels of each mlp: the weights change, the function does not."""

    def prepare(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        for name, module in linears(model).items():
            order = torch.arange(64).flip(0)
            if name.endswith("down_proj"):
                module.weight.data = module.weight.data[:, order]  # type: ignore[union-attr,index]
            elif "mlp" in name:
                module.weight.data = module.weight.data[order]  # type: ignore[union-attr,index]


@dataclass(frozen=True, kw_only=True)
class Doubles(Method):
    """Changes the function of the model, in `prepare` or in `transform`."""

    hook: str

    def prepare(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        if self.hook == "prepare":
            next(iter(linears(model).values())).weight.data.mul_(2)  # type: ignore[union-attr,operator]

    def transform(self, group: InputGroup, stats: Stats) -> None:
        if self.hook == "transform":
            next(iter(group.linears.values())).weight.data.mul_(2)  # type: ignore[union-attr,operator]


def config(tiny: Tiny, *overrides: str, **steps: Method) -> RunConfig:
    return replace(build_run(tiny(*overrides)), steps=steps)


def inputs_of(model: nn.Module, name: str) -> Tensor:
    """The inputs (T, K) of a linear on TOKENS, recorded by a separate hook."""
    inputs: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, args, _out: inputs.append(args[0]))
    with torch.no_grad():
        for sequence in TOKENS:
            model(input_ids=sequence[None])
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])


def test_groups_come_in_order_and_every_linear_gets_its_inputs(tiny: Tiny) -> None:
    model, recorder = build("llama"), Recorder(groups=[], inputs=[])
    names = list(linears(model))
    expected = [inputs_of(model, name) for name in names]
    quantize(model, config(tiny, "scheme=channel", "engine.propagate=float", recorder=recorder), TOKENS)
    block = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert recorder.groups == block * 2
    assert len(recorder.inputs) == len(names)
    for inputs, expected_inputs in zip(recorder.inputs, expected, strict=True):
        torch.testing.assert_close(inputs, expected_inputs)
    assert recorder.inputs[0].shape == (TOKENS.numel(), 32)


def test_a_rewrite_and_rtn_equal_both_steps_by_hand(tiny: Tiny) -> None:
    composed, by_hand = build("llama"), build("llama")
    cfg = config(tiny, "scheme=channel", swap=SwapChannels(), rtn=RTN())
    quantize(composed, cfg, TOKENS)
    SwapChannels().prepare(by_hand, {})
    assert cfg.scheme is not None
    for name, module in linears(by_hand).items():
        linear = composed.get_submodule(name)
        assert isinstance(linear, QuantLinear)
        assert linear.packed is not None
        expected = round_to_nearest(weight_of(module), cfg.scheme.weight).dequantize()
        assert torch.equal(linear.packed.dequantize(), expected)


@pytest.mark.parametrize("hook", ["prepare", "transform"])
def test_a_step_that_changes_the_function_is_refused(tiny: Tiny, hook: str) -> None:
    cfg = config(tiny, "scheme=channel", doubles=Doubles(hook=hook), rtn=RTN())
    with pytest.raises(
        ValueError,
        match="method.doubles: the rewrite changed the float model's function: the relative error of the .* is",
    ):
        quantize(build("llama"), cfg, TOKENS)


@dataclass(frozen=True, kw_only=True)
class BreaksContract(Method):
    """Breaks the contract of `quantize` in one of several ways."""

    defect: str

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> Any:
        if self.defect == "nothing":
            return None
        if self.defect == "shape":
            return round_to_nearest(weight[:, :8], scheme.weight)
        qtensor = round_to_nearest(weight, scheme.weight)
        if self.defect == "in place":
            weight.mul_(1.0)
        if self.defect == "nan":
            qtensor.scale[0, 0] = torch.nan
        return qtensor


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("nothing", r"quantize returned NoneType of shape \(\); expected a QTensor of shape \(32, 32\)"),
        ("shape", r"quantize returned IntQTensor of shape \(32, 8\); expected a QTensor of shape \(32, 32\)"),
        ("in place", "quantize changed its weight argument in place"),
        ("nan", "the quantized weight decodes to NaN or infinite values"),
    ],
)
def test_quantize_must_keep_the_contract(tiny: Tiny, defect: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^model.layers.0.self_attn.q_proj: {message}"):
        quantize(build("llama"), config(tiny, "scheme=channel", broken=BreaksContract(defect=defect)), TOKENS)


def test_static_activation_ranges_are_those_of_the_float_inputs(tiny: Tiny) -> None:
    model = build("llama")
    expected = {name: inputs_of(model, name).abs().max() for name in linears(model)}
    quantize(model, config(tiny, "scheme=w8a8_static", rtn=RTN()), TOKENS)
    for name, absmax in expected.items():
        quantizer = model.get_submodule(name).input_quantizer
        torch.testing.assert_close(quantizer.scale, absmax / 127)  # type: ignore[union-attr]


def test_an_error_of_a_method_names_the_linear(tiny: Tiny) -> None:
    model = build("llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^model.layers.1.mlp.up_proj: the weight holds NaN or infinite values"):
        quantize(model, config(tiny, "scheme=channel", rtn=RTN()), TOKENS)


def test_minmax_streams() -> None:
    stat = MinMax(3)
    for part in (torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[-4.0, 0.5, 1.0]])):
        stat.update(part, part)
    assert (float(stat.low), float(stat.high)) == (-4.0, 3.0)


@dataclass(frozen=True, kw_only=True)
class QuantizingRecorder(Method):
    """Records its inputs and rounds; at two bits the inputs of later linears change clearly."""

    needs: ClassVar = (Rows,)
    inputs: list[Tensor]
    one_by_one: bool = False

    @property
    def sequential(self) -> bool:
        return self.one_by_one

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        self.inputs.append(stats[Rows].rows)
        return round_to_nearest(weight, scheme.weight)


def round_by_hand(model: nn.Module, cfg: RunConfig, names: list[str]) -> None:
    assert cfg.scheme is not None
    for name in names:
        weight = weight_of(model.get_submodule(name))
        weight.data.copy_(round_to_nearest(weight.data, cfg.scheme.weight).dequantize())


@pytest.mark.parametrize("one_by_one", [False, True])
def test_inputs_are_the_outputs_of_the_quantized_prefix(tiny: Tiny, one_by_one: bool) -> None:
    recorder, by_hand = QuantizingRecorder(inputs=[], one_by_one=one_by_one), build("llama")
    cfg = config(tiny, "scheme=channel", "bits=2", recorder=recorder)
    quantize(build("llama"), cfg, TOKENS)
    names = list(linears(by_hand))
    groups = [names[0:3], names[3:4], names[4:6], names[6:7], names[7:10], names[10:11], names[11:13], names[13:14]]
    expected: list[Tensor] = []
    for index, group in enumerate(groups):
        expected += [inputs_of(by_hand, group[0])] * len(group)
        if one_by_one:
            round_by_hand(by_hand, cfg, group)
        elif index == 3:  # the last group of the first block
            round_by_hand(by_hand, cfg, names[:7])
    float_model = build("llama")
    assert len(recorder.inputs) == len(names) == 14
    for name, inputs, expected_inputs in zip(names, recorder.inputs, expected, strict=True):
        torch.testing.assert_close(inputs, expected_inputs, rtol=1e-4, atol=1e-5)
        quantized_before = one_by_one and "q_proj" not in name and "k_proj" not in name and "v_proj" not in name
        changes = name.startswith("model.layers.1") or quantized_before
        assert torch.allclose(inputs, inputs_of(float_model, name), rtol=1e-4, atol=1e-5) != changes, name


class Pairs(Rows):
    """Stores the float model's inputs of the same tokens too."""

    compares = True

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.references = torch.zeros(0, in_features)

    def update(self, inputs: Tensor, reference: Tensor) -> None:
        super().update(inputs, reference)
        self.references = torch.cat([self.references, reference])


@dataclass(frozen=True, kw_only=True)
class ComparingRecorder(QuantizingRecorder):
    """Records the float model's inputs as well."""

    needs: ClassVar = (Pairs,)
    references: list[Tensor]

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        self.inputs.append(stats[Pairs].rows)
        self.references.append(stats[Pairs].references)
        return round_to_nearest(weight, scheme.weight)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_statistic_may_compare_with_the_float_model(tiny: Tiny, one_by_one: bool, family: str) -> None:
    float_model = build(family)
    recorder = ComparingRecorder(inputs=[], references=[], one_by_one=one_by_one)
    quantize(build(family), config(tiny, "scheme=channel", "bits=2", recorder=recorder), TOKENS)
    names = list(linears(float_model))
    assert len(recorder.references) == len(names)
    for name, reference in zip(names, recorder.references, strict=True):
        torch.testing.assert_close(reference, inputs_of(float_model, name), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(recorder.references[-1], recorder.inputs[-1], rtol=1e-2)


def test_with_float_propagation_there_is_nothing_to_compare(tiny: Tiny) -> None:
    recorder = ComparingRecorder(inputs=[], references=[])
    cfg = config(tiny, "scheme=channel", "bits=2", "engine.propagate=float", recorder=recorder)
    quantize(build("llama"), cfg, TOKENS)
    for inputs, reference in zip(recorder.inputs, recorder.references, strict=True):
        assert torch.equal(inputs, reference)


def test_float_inputs_do_not_depend_on_quantized_blocks(tiny: Tiny) -> None:
    recorder, model = QuantizingRecorder(inputs=[], one_by_one=True), build("llama")
    expected = [inputs_of(model, name) for name in linears(model)]
    cfg = config(tiny, "scheme=channel", "bits=2", "engine.propagate=float", recorder=recorder)
    quantize(model, cfg, TOKENS)
    for inputs, expected_inputs in zip(recorder.inputs, expected, strict=True):
        torch.testing.assert_close(inputs, expected_inputs)


@pytest.mark.parametrize("method", ["smoothquant_gptq", "awq_gptq"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_composite_equals_its_steps_by_hand(tiny: Tiny, family: str, method: str) -> None:
    composed, by_hand = uneven(build(family)), uneven(build(family))
    cfg = build_run(tiny(f"method={method}", "scheme=channel"))
    quantize(composed, cfg, TOKENS)
    (first, step), (_, last) = cfg.steps.items()
    with torch.no_grad():
        for index in range(2):
            block = Block(by_hand, index, cfg.scheme)
            block_stats = [block.stats(group, step.needs) for group in block.groups]
            for group, stats in zip(block.groups, block_stats, strict=True):
                if step.searches:
                    block.search(group, stats)
                step.transform(group, stats)
    assert relative(logits(by_hand), logits(uneven(build(family)))) < 1e-4
    quantize(by_hand, replace(cfg, steps={"gptq": last}), TOKENS)
    alone = uneven(build(family))
    quantize(alone, replace(cfg, steps={"gptq": last}), TOKENS)
    codes = codes_of(composed)
    assert codes.keys() == linears(build(family)).keys()
    assert all(torch.equal(value, codes_of(by_hand)[name]) for name, value in codes.items())
    assert not all(torch.equal(value, codes_of(alone)[name]) for name, value in codes.items()), first


def test_a_step_that_rewrites_and_quantizes_uses_statistics_of_rescaled_inputs(tiny: Tiny) -> None:
    model, by_hand = uneven(build("llama")), uneven(build("llama"))
    cfg = build_run(tiny("method=awq", "scheme=channel", "bits=3", "engine.propagate=float"))
    quantize(model, cfg, TOKENS)
    (step,) = cfg.steps.values()
    assert cfg.scheme is not None
    with torch.no_grad():
        for index in range(2):
            block = Block(by_hand, index, cfg.scheme)
            block_stats = [block.stats(group, step.needs) for group in block.groups]
            for group, stats in zip(block.groups, block_stats, strict=True):
                block.search(group, stats)
                step.transform(group, stats)
            for group in block.groups:
                for name, weight in group.weights.items():
                    expected = step.quantize(weight, cfg.scheme, block.stats(group, step.needs)).dequantize()
                    assert relative(model.get_submodule(name).packed.dequantize(), expected) < 1e-3, name


def test_a_step_that_only_rewrites_sees_the_float_model(tiny: Tiny) -> None:
    recorder, model = Recorder(groups=[], inputs=[]), build("llama")
    plain = build("llama")
    quantize(model, config(tiny, "scheme=channel", "bits=2", recorder=recorder, rtn=RTN()), TOKENS)
    quantize(plain, config(tiny, "scheme=channel", "bits=2", rtn=RTN()), TOKENS)
    assert recorder.inputs == [], "the last step chooses the codes"
    assert len(recorder.groups) == 8
    assert all(torch.equal(value, codes_of(plain)[name]) for name, value in codes_of(model).items())


@dataclass(frozen=True, kw_only=True)
class Warns(Method):
    """Warns about every group and every weight."""

    needs: ClassVar = (Rows,)

    def transform(self, group: InputGroup, stats: Stats) -> None:
        warnings.warn("looked at", stacklevel=2)

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        warnings.warn(f"has {weight.shape[0]} rows", stacklevel=2)
        return round_to_nearest(weight, scheme.weight)


def test_warnings_of_a_method_are_kept_with_the_name_of_the_linear(tiny: Tiny) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning that escapes fails the test
        result = quantize(build("llama"), config(tiny, "scheme=channel", warns=Warns()), TOKENS)
    assert len(result.warnings) == 8 + 14
    down = "model.layers.1.mlp.down_proj"
    assert [note for note in result.warnings if note.startswith(down)] == [f"{down}: looked at", f"{down}: has 32 rows"]
    gate, up = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"
    assert f"{gate} + {up}: looked at" in result.warnings


@dataclass(frozen=True, kw_only=True)
class WarnsOnce(Method):
    """Warns about the whole model, in `prepare` and in `rotate`."""

    def prepare(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        warnings.warn("prepared", stacklevel=2)

    def rotate(self, residual: Residual) -> None:
        warnings.warn(f"is {residual.width} wide", stacklevel=2)


def test_warnings_of_a_method_about_the_model_are_kept(tiny: Tiny) -> None:
    cfg = config(tiny, "scheme=channel", once=WarnsOnce())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = quantize(build("llama"), cfg, TOKENS)
    assert result.warnings == ["method.once: prepared", "method.once: is 32 wide"]


def test_a_skipped_member_stays_float_and_is_rescaled_with_its_group(tiny: Tiny) -> None:
    model, plain = uneven(build("llama")), uneven(build("llama"))
    cfg = build_run(tiny("method=smoothquant", "scheme=channel", "bits=8", "skip=[*.up_proj]"))
    result = quantize(model, cfg, TOKENS)
    name = "model.layers.0.mlp.up_proj"
    norm = "model.layers.0.post_attention_layernorm.weight"
    assert isinstance(model.get_submodule(name), nn.Linear)
    scale = plain.get_parameter(norm) / model.get_parameter(norm)
    assert (scale / scale.mean() - 1).abs().max() > 0.1
    down = (plain.get_parameter(f"{name}.weight") * scale) / model.get_parameter(f"{name}.weight")
    assert (down / down[:, :1] - 1).abs().max() < 1e-4, "equal except for its rows, which absorb the scale of down_proj"
    assert relative(logits(model), logits(plain)) < 0.05
    rows = {row["name"]: row for row in result.layers}
    assert rows[name] == {"name": name, "shape": [64, 32], "stored_bits": 32 * 64 * 32, "bits_per_weight": 32.0}
    assert rows["model.layers.0.mlp.gate_proj"]["rescaled_by"] == "model.layers.0.post_attention_layernorm"
    assert len(rows) == 14


def test_a_group_whose_linears_are_all_skipped_stays_unchanged(tiny: Tiny) -> None:
    model, plain = uneven(build("llama")), uneven(build("llama"))
    cfg = build_run(tiny("method=smoothquant", "scheme=channel", "bits=8", "skip=[*gate_proj,*up_proj,*down_proj]"))
    quantize(model, cfg, TOKENS)
    for name, value in plain.named_parameters():
        if "mlp" in name or "post_attention" in name:
            assert torch.equal(model.get_parameter(name), value), name


def test_linears_that_are_rescaled_twice_name_the_producers_of_both_steps(tiny: Tiny) -> None:
    cfg = build_run(tiny("method=smoothquant_gptq", "scheme=channel"))
    twice = {"one": cfg.steps["smoothquant"], "two": cfg.steps["smoothquant"], "gptq": cfg.steps["gptq"]}
    result = quantize(build("llama"), replace(cfg, steps=twice), TOKENS)
    assert result.layers[0]["rescaled_by"] == "model.layers.0.input_layernorm, model.layers.0.input_layernorm"


def test_progress_names_the_block_and_the_error_so_far(tiny: Tiny) -> None:
    progress: list[tuple[str, int | None]] = []

    def track(items: Iterable[Any], label: Any, total: int | None = None) -> Iterator[Any]:
        text = label if callable(label) else lambda: label
        progress.append((text(), total))
        for item in items:
            yield item
            progress.append((text(), total))

    result = quantize(build("llama"), build_run(tiny("method=smoothquant_gptq", "scheme=channel")), TOKENS, track)  # type: ignore[arg-type]
    errors = [row["output_error"] for row in result.layers]
    first, second = (sum(errors[i : i + 7]) / 7 for i in (0, 7))
    assert progress == [
        ("smoothquant block 1/2", 2),
        ("smoothquant block 2/2", 2),
        ("smoothquant block 2/2", 2),
        ("gptq block 1/2", 2),
        (f"gptq block 2/2, error {first:.3f}", 2),
        (f"gptq block 2/2, error {second:.3f}", 2),
    ]


def test_which_configurations_need_calibration_data(tiny: Tiny) -> None:
    for overrides, calibrates in [
        (["method=rtn"], False),
        (["method=none"], False),
        (["method=rtn", "scheme=w8a8_static"], True),
        (["method=rtn", "scheme=w8a8_token"], False),
        (["method=gptq"], True),
        (["method=smoothquant", "scheme=w8a8_token"], True),
    ]:
        assert build_run(tiny(*overrides)).calibrates == calibrates, overrides


def test_recorded_errors_are_those_of_weights_and_of_outputs_on_calibration_data(tiny: Tiny) -> None:
    model, plain = build("llama"), build("llama")
    result = quantize(model, build_run(tiny("method=gptq", "scheme=channel", "engine.propagate=float")), TOKENS)
    for row in result.layers:
        linear, weight = model.get_submodule(row["name"]), weight_of(plain.get_submodule(row["name"]))
        assert row["weight_error"] == pytest.approx(relative(linear.packed.dequantize(), weight), rel=1e-5)
        inputs = inputs_of(plain, row["name"])  # 16 tokens a sequence: all of them are sampled
        expected = relative(inputs @ linear.packed.dequantize().T, inputs @ weight.T)
        assert row["output_error"] == pytest.approx(expected, rel=1e-3)


def test_a_weight_that_two_linears_share_counts_once(tiny: Tiny) -> None:
    model = build("llama")
    first, second = (model.get_submodule(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1))
    second.weight = first.weight
    weights = sum(weight_of(module).numel() for module in linears(model).values()) - first.weight.numel()  # type: ignore[union-attr,operator]
    result = quantize(model, build_run(tiny("method=rtn", "scheme=channel", "bits=8")), TOKENS)
    assert len(result.layers) == 14
    assert result.sizes.weights == weights
    assert result.sizes.stored_bits == sum(row["stored_bits"] for row in result.layers[1:])
