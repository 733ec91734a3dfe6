"""Rotations: the stream is found in each family or refused by name; the function stays; outliers disappear."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from harness.config import build_run
from harness.core import Method, Residual, hadamard
from harness.core.rotated import Rotated
from harness.models import Decoder, weight_of
from harness.nn import QuantLinear, stored_bytes
from harness.quantization.residual_stream import discover, measured
from methods.rotate import Rotate, random_orthogonal, turn
from methods.rtn import RTN
from tests.support.blocks import TOKENS, codes_of, logits, relative
from tests.support.decoders import linears, quantize
from tests.support.families import build, uneven

pytestmark = pytest.mark.usefixtures("torch_kernels")

Tiny = Callable[..., dict[str, Any]]

PRE_NORM = {"do_layer_norm_before": True, "word_embed_proj_dim": 32}
CENTRED: dict[str, dict[str, Any]] = {"opt": PRE_NORM, "gpt2": {}, "gpt_neox": {}, "bloom": {}, "falcon": {}}
PLAIN: dict[str, dict[str, Any]] = {name: {} for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")}
TAKEN = PLAIN | CENTRED | {"gpt_neox": {"use_parallel_residual": False}, "llama": {"tie_word_embeddings": True}}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* shared its weight with")
        yield


class Precise(nn.Module):
    """An RMSNorm that computes in the precision of its input, unlike those of transformers."""

    def __init__(self, weight: Tensor, offset: float) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(weight), offset

    def forward(self, values: Tensor) -> Tensor:
        return values * (values.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.weight + self.offset)


def precise(model: nn.Module) -> nn.Module:
    model = model.double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, Precise(module.weight, float("Gemma" in type(module).__name__)))  # type: ignore[arg-type]
    return model


def residual_of(model: nn.Module) -> Residual:
    return discover(Decoder(model), TOKENS[:1])


def rotated(model: nn.Module, **options: Any) -> nn.Module:
    Rotate(**options).rotate(residual_of(model))
    return model


@pytest.mark.parametrize("options", [{}, {"kind": "orthogonal", "online": False}], ids=["hadamard", "orthogonal"])
@pytest.mark.parametrize("family", TAKEN)
def test_the_function_stays(family: str, options: dict[str, Any]) -> None:
    model = uneven(build(family, **TAKEN[family]))
    before = logits(model)
    assert relative(logits(rotated(model, **options)), before) < 1e-5


@pytest.mark.parametrize("family", CENTRED | PLAIN)
def test_the_function_stays_exactly_in_float64(family: str) -> None:
    model = precise(uneven(build(family, **(CENTRED | PLAIN)[family])))
    before = logits(model)
    assert relative(logits(rotated(model)), before) < 1e-10


@pytest.mark.parametrize("family", TAKEN)
def test_folding_alone_keeps_the_function_and_removes_gains(family: str) -> None:
    model = uneven(build(family, **TAKEN[family]))
    before = logits(model)
    residual = residual_of(model)
    kinds = {norm.centred for norm in residual.norms}
    assert kinds == {family in CENTRED}
    residual.fold()
    assert relative(logits(model), before) < 1e-5
    for norm in residual.norms:
        module = model.get_submodule(norm.name)
        if family in CENTRED:
            assert type(module) is nn.RMSNorm
            assert module.weight is None
        else:
            assert module is norm.module
            assert torch.equal(norm.gain, torch.ones(32, dtype=torch.float64))
    first = model.get_submodule(residual.norms[0].name)
    norm_inputs: list[Tensor] = []
    first.register_forward_pre_hook(lambda _m, args: norm_inputs.append(args[0]))
    logits(model)
    assert (float(norm_inputs[0].mean(-1).abs().max()) < 1e-6) == (family in CENTRED)


def test_writers_and_readers_of_the_residual_stream() -> None:
    residual = residual_of(build("gpt2"))
    assert [table.name for table in residual.tables] == ["transformer.wte", "transformer.wpe"]
    assert [port.name.partition(".h.")[2] for port in residual.writers] == [
        f"{i}.{name}" for i in (0, 1) for name in ("attn.c_proj", "mlp.c_proj")
    ]
    assert {norm.name.rpartition(".h.")[2]: [port.name for port in norm.readers] for norm in residual.norms[-2:]} == {
        "1.ln_2": ["transformer.h.1.mlp.c_fc"],
        "transformer.ln_f": ["lm_head"],
    }
    assert residual.width == 32
    assert residual_of(build("bloom")).tables[0].norm is not None


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gemma2", {}, "the norm model.layers.0.post_attention_layernorm is read by add in model.layers.0"),
        ("opt", {}, "the norm model.decoder.layers.0.self_attn_layer_norm is read by add in model.decoder.layers.0"),
        (
            "mixtral",
            {},
            "the norm model.layers.0.post_attention_layernorm is read by linear in model.layers.0.mlp.gate",
        ),
    ],
)
def test_the_module_that_prevents_a_rotation_is_named(
    tiny: Tiny, family: str, options: dict[str, Any], message: str
) -> None:
    model = build(family, **options)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match=f"^method.rotate: the model cannot be rotated: {message}.*; use a method"):
        quantize(model, build_run(tiny("method=rotate", "scheme=channel")), TOKENS)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


class Toy(nn.Module):
    """A decoder of two blocks x + w(r(norm(x))) with the interface of transformers; `how` selects one defect."""

    def __init__(self, norm: Callable[[], nn.Module], how: str = "") -> None:
        super().__init__()
        self.how = how
        self.embed = nn.Embedding(128, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": norm(), "read": nn.Linear(8, 12), "write": nn.Linear(12, 8)}) for _ in range(2)
        )
        self.norm = nn.RMSNorm(8) if how == "mixed" else norm()
        self.head = nn.Linear(8, 128, bias=False)
        if how == "shared":
            self.layers[1]["write"].weight = self.layers[0]["write"].weight  # type: ignore[index]
        if how == "transform":
            self.transform = nn.Linear(8, 8)
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        x = self.embed(input_ids)
        for layer in self.layers:
            normed = layer["norm"](x)  # type: ignore[index]
            hidden = torch.tanh(layer["read"](normed))  # type: ignore[index]
            x = x if self.how == "idle" and layer is self.layers[1] else x + layer["write"](hidden)  # type: ignore[index]
            if self.how == "relu":
                x = torch.relu(x)
            if self.how == "constant":
                x = x + torch.ones(8)
        x = self.norm(x)
        return SimpleNamespace(logits=self.head(torch.tanh(self.transform(x)) if self.how == "transform" else x))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("mixed", "some norms of its residual stream subtract the mean and some do not"),
        ("shared", "modules that read or write its residual stream share weights"),
        ("transform", "head shares a weight with a module of its residual stream, but is none of them"),
        ("idle", "layers.1.write did not run on the probe tokens"),
        ("relu", "its residual stream is read by relu in the model itself"),
        ("constant", "its residual stream is read by add of a tensor from no linear or embedding in the model itself"),
    ],
)
def test_a_stream_that_cannot_be_turned_is_refused(how: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        residual_of(Toy(lambda: nn.LayerNorm(8), how))


class Named(nn.Module):
    """A model inside a module with a long name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.add_module("name" * 40, model)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        (model,) = self.children()
        return model(input_ids, use_cache)


def test_a_refusal_with_long_names_has_200_characters(tiny: Tiny) -> None:
    model = Named(Toy(lambda: nn.LayerNorm(8), "relu"))
    message = r"^method.rotate: the model cannot be rotated: .* by relu in name.*\.\.\.; use a method without rotation"
    with pytest.raises(ValueError, match=message) as caught:
        quantize(model, build_run(tiny("method=rotate", "scheme=channel")), TOKENS)
    assert len(str(caught.value)) == 200


def test_a_folded_layernorm_is_the_formulas() -> None:
    model = uneven(Toy(lambda: nn.LayerNorm(8, eps=1e-3))).double()
    old = copy.deepcopy(model)
    before = logits(model)
    residual = residual_of(model)
    assert [norm.eps for norm in residual.norms] == pytest.approx([1e-3] * 3)
    residual.fold()
    centre = torch.eye(8, dtype=torch.float64) - 1 / 8
    assert relative(model.get_parameter("embed.weight"), old.get_parameter("embed.weight") @ centre) < 1e-12
    for i in (0, 1):
        gain, bias = (old.get_parameter(f"layers.{i}.norm.{part}") for part in ("weight", "bias"))
        read, write = (old.get_submodule(f"layers.{i}.{name}") for name in ("read", "write"))
        new_read, new_write = (model.get_submodule(f"layers.{i}.{name}") for name in ("read", "write"))
        assert relative(new_read.weight, read.weight @ torch.diag(gain)) < 1e-12  # type: ignore[arg-type,operator]
        assert relative(new_read.bias, read.bias + read.weight @ bias) < 1e-12  # type: ignore[arg-type,operator]
        assert relative(new_write.weight, centre @ write.weight) < 1e-12  # type: ignore[arg-type,operator]
        assert relative(new_write.bias, centre @ write.bias) < 1e-12  # type: ignore[arg-type,operator]
    head, bias = old.get_parameter("head.weight"), old.get_parameter("norm.bias")
    assert relative(model.get_parameter("head.bias"), head @ bias) < 1e-12
    assert relative(logits(model), before) < 1e-12
    residual.fold()  # a second fold changes nothing
    assert relative(logits(model), before) < 1e-12


def test_rotated_weights_are_the_formulas() -> None:
    model = uneven(build("llama")).double()
    old = dict(copy.deepcopy(model).named_parameters())
    rotated(model, seed=3)
    q = turn(32, "hadamard", 3)(torch.eye(32, dtype=torch.float64))
    heads, hidden = (hadamard.rotate(torch.eye(size, dtype=torch.float64)) for size in (32, 64))
    assert relative(q @ q.T, torch.eye(32)) < 1e-12
    new = dict(model.named_parameters())
    block = "model.layers.1."
    for norm, names in {
        block + "input_layernorm": [block + f"self_attn.{name}_proj" for name in "qkv"],
        block + "post_attention_layernorm": [block + f"mlp.{name}_proj" for name in ("gate", "up")],
        "model.norm": ["lm_head"],
    }.items():
        for name in names:
            expected = old[f"{name}.weight"] @ torch.diag(old[f"{norm}.weight"]) @ q
            assert relative(new[f"{name}.weight"], expected) < 1e-12, name
        assert torch.equal(new[f"{norm}.weight"], torch.ones(32).double())
    assert relative(new["model.embed_tokens.weight"], old["model.embed_tokens.weight"] @ q) < 1e-12
    out, down = block + "self_attn.o_proj", block + "mlp.down_proj"
    assert relative(new[f"{out}.linear.weight"], q.T @ old[f"{out}.weight"] @ heads) < 1e-12
    assert relative(new[f"{down}.linear.weight"], q.T @ old[f"{down}.weight"] @ hidden) < 1e-12


@pytest.mark.parametrize("make_module", [lambda: nn.Linear(24, 7), lambda: Conv1D(7, 24)], ids=["linear", "conv1d"])
def test_an_online_transform_is_undone_by_the_weight(make_module: Callable[[], nn.Module]) -> None:
    module = make_module().double()
    inputs = torch.randn(2, 5, 24, dtype=torch.float64)
    before = module(inputs)
    weight = weight_of(module)
    weight.copy_(hadamard.rotate(weight))
    assert relative(Rotated(module)(inputs), before) < 1e-12
    assert relative(module(inputs), before) > 0.1


def flatness(inputs: Tensor) -> float:
    """Mean over tokens of the largest magnitude divided by the root mean square; 1 is flat."""
    return float((inputs.abs().amax(-1) / inputs.square().mean(-1).sqrt()).mean())


def planted() -> nn.Module:
    """A llama with outlier channels in its residual stream, in the values of attention and in the MLP's hidden states.

    Readers multiply them by small weights, as in a trained model, so outliers matter only for the range of the grid.
    """
    model = build("llama", hidden_size=128, intermediate_size=256)
    model.get_parameter("model.embed_tokens.weight")[:, 5] *= 25
    model.get_parameter("lm_head.weight")[:, 5] /= 25
    for i in (0, 1):
        block = model.get_submodule(f"model.layers.{i}")
        weights = {name.rpartition(".")[2]: module.weight for name, module in block.named_modules() if "_proj" in name}
        for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            weights[name][:, 5] /= 25  # type: ignore[index,operator]
        for producer, row, reader, columns in [("v_proj", 3, "o_proj", [3, 35]), ("up_proj", 9, "down_proj", [9])]:
            weights[producer][row] *= 40  # type: ignore[index,operator]
            weights[reader][:, columns] /= 40  # type: ignore[index,operator]
    return model


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """The input of each linear of the blocks on TOKENS, by its name in the float model."""
    inputs: dict[str, Tensor] = {}
    for name, module in linears(model).items():
        module.register_forward_pre_hook(
            lambda _m, args, name=name: inputs.__setitem__(name.removesuffix(".linear"), args[0])
        )
    logits(model)
    return inputs


def test_outliers_are_spread_over_all_channels() -> None:
    before, after = inputs_of(planted()), inputs_of(rotated(planted()))
    offline = inputs_of(rotated(planted(), online=False))
    assert before.keys() == after.keys()
    for name, inputs in before.items():
        assert flatness(inputs) > 4, name
        assert flatness(after[name]) < 0.75 * flatness(inputs), name
        reads_no_norm = "o_proj" in name or "down_proj" in name
        assert (relative(offline[name], inputs) < 1e-4) == reads_no_norm, (
            "without a norm before it, an input is rotated only at run time"
        )


def test_four_bit_activations_need_a_rotation(tiny: Tiny) -> None:
    expected, errors = logits(planted()), []
    for method in ("rtn", "rotate"):
        model = planted()
        cfg = build_run(tiny(f"method={method}", "scheme=w4a4_token", "scheme.weight.bits=8"))
        quantize(model, cfg, TOKENS)
        errors.append(relative(logits(model), expected))
    assert errors[1] < 0.4 * errors[0]


def test_a_tied_head_is_untied_once_with_a_warning_of_its_cost(tiny: Tiny) -> None:
    model, unrotated = uneven(build("gemma")), build("gemma")
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    size = stored_bytes(unrotated)
    cfg = build_run(tiny("method=rotate", "scheme=channel_sym", "bits=8"))
    result = quantize(model, cfg, TOKENS)
    mib = 128 * 32 * 4 / 2**20
    assert [note for note in result.warnings if "shared" in note] == [
        "method.rotate: lm_head shared its weight with model.embed_tokens and now has a separate copy, because the "
        f"final norm's gain is folded into it: {mib:.1f} MiB more"
    ]
    assert model.config.tie_word_embeddings is False  # type: ignore[union-attr]
    model.tie_weights()  # type: ignore[operator]
    assert relative(logits(model), logits(uneven(unrotated))) < 0.05
    quantize(other := build("gemma"), replace(cfg, steps={"rtn": RTN()}), TOKENS)
    assert stored_bytes(model) == stored_bytes(other) + 128 * 32 * 4 < size + 128 * 32 * 4


def test_online_transforms_store_nothing() -> None:
    model = build("llama")
    size = stored_bytes(model)
    rotated(model)
    assert stored_bytes(model) == size


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_rotate_then_gptq_is_its_steps_by_hand(tiny: Tiny, family: str) -> None:
    composed, by_hand = (uneven(build(family, **TAKEN[family])) for _ in range(2))
    cfg = build_run(tiny("method=rotate_gptq", "scheme=w4a4_token"))
    result = quantize(composed, cfg, TOKENS)
    rotated(by_hand)
    names = list(linears(by_hand))
    quantize(by_hand, replace(cfg, steps={"gptq": cfg.steps["gptq"]}), TOKENS)
    codes = codes_of(by_hand)
    assert codes.keys() == set(names)
    assert all(torch.equal(value, codes[name]) for name, value in codes_of(composed).items())
    assert sorted(row["name"] for row in result.layers) == sorted(names)
    assert all("output_error" in row for row in result.layers)


def test_packed_and_simulated_runs_of_a_rotated_model_agree(tiny: Tiny) -> None:
    outputs = []
    for execution in ("packed", "simulated"):
        model = uneven(build("llama"))
        cfg = build_run(tiny("method=rotate", "scheme=w4a4_token", f"execution={execution}"))
        result = quantize(model, cfg, TOKENS)
        assert result.kernels == ({"reference"} if execution == "packed" else set())
        outputs.append(logits(model))
    assert relative(outputs[0], outputs[1]) < 1e-5


def test_skip_names_linears_as_the_float_model_does(tiny: Tiny) -> None:
    model = uneven(build("llama"))
    cfg = build_run(tiny("method=rotate", "scheme=channel", "skip=['*.down_proj']"))
    result = quantize(model, cfg, TOKENS)
    down = "model.layers.0.mlp.down_proj"
    assert type(model.get_submodule(down)) is Rotated
    assert type(model.get_submodule(f"{down}.linear")) is nn.Linear
    assert type(model.get_submodule("model.layers.0.self_attn.o_proj.linear")) is QuantLinear
    rows = {row["name"]: row["bits_per_weight"] for row in result.layers}
    assert (rows[f"{down}.linear"], len(rows)) == (32.0, 14)


def test_the_seed_decides_the_rotation() -> None:
    first, again, other = (rotated(build("llama"), seed=seed) for seed in (1, 1, 2))
    drawn = rotated(build("llama"), seed=1, kind="orthogonal")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert relative(other.get_parameter(name), first.get_parameter(name)) > 0.1
    assert relative(drawn.get_parameter(name), first.get_parameter(name)) > 0.1


def test_a_random_matrix_is_orthogonal() -> None:
    matrix = random_orthogonal(24, torch.Generator().manual_seed(2))
    assert relative(matrix @ matrix.T, torch.eye(24)) < 1e-12


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "opt"])
def test_a_norm_is_measured(family: str) -> None:
    model = uneven(build(family))
    for name, module in model.named_modules():
        if "norm" in name or "ln_" in name:
            norm = measured(name, module)
            assert norm is not None
            assert (norm.offset, norm.centred) == (family == "gemma", family in ("gpt2", "opt"))
            assert norm.eps == pytest.approx(1e-6 if family in ("llama", "gemma") else 1e-5, rel=1e-3)
            values = torch.randn(5, 32) + 1
            assert relative(norm.of(values), module(values)) < 1e-6


def test_a_module_that_is_not_a_norm_is_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, values: Tensor) -> Tensor:
            return F.softmax(values, -1) * self.weight

    assert measured("scale", Scale()) is None
    with pytest.raises(ValueError, match="^layers.0.norm is neither RMSNorm nor LayerNorm"):
        residual_of(Toy(Scale))


@dataclass(frozen=True, kw_only=True)
class Skewed(Method):
    """Multiplies the residual stream by a matrix that is not orthogonal."""

    def rotate(self, residual: Residual) -> None:
        residual.turn(lambda values: values * 1.1)


def test_a_matrix_that_is_not_orthogonal_is_refused(tiny: Tiny) -> None:
    cfg = replace(build_run(tiny("scheme=channel")), steps={"skewed": Skewed()})
    with pytest.raises(
        ValueError,
        match="method.skewed: the rewrite changed the float model's function: the relative error of .* 0.0001",
    ):
        quantize(build("llama"), cfg, TOKENS)


def test_a_rotated_model_is_not_saved(tiny: Tiny) -> None:
    with pytest.raises(
        ValueError, match="^save=here cannot keep the changes that method.rotate makes to modules other than linears"
    ):
        build_run(tiny("method=rotate_gptq", "save=here"))


def test_a_seed_out_of_range(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=r"^method.rotate.seed=-1 is out of range; expected 0 to 2\^63 - 1$"):
        build_run(tiny("method=rotate", "method.rotate.seed=-1"))
