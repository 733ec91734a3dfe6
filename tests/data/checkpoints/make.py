"""Writes the checkpoints beside this file, by the libraries that define their formats: `python make.py FOLDER LIBRARY`.

Each has a tiny Llama with random weights; `expected.safetensors` has the weights that the library decodes, in float32
arithmetic, and `inputs.safetensors` inputs of linears with what the library rounds them to: (2, T, K).

The libraries are no dependencies of this project. All ran on processors alone, with torch 2.13.0:

    hqq, hqq_without   hqq 0.2.8.post1 with transformers 4.57.6, because transformers 5.23.0 does not write this format
    quanto             optimum-quanto 0.2.7 with transformers 5.23.0
    torchao*           torchao 0.18.0 with transformers 5.23.0
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TAGS = (*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in MLP))

Rounded = dict[str, Callable[[Tensor], Tensor]]


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape | options))


def linears(model: nn.Module) -> dict[str, Any]:
    """The linears of the blocks, by name."""
    return {name: module for name, module in model.named_modules() if name.endswith(TAGS)}


def loaded(source: Any, folder: Path, config: Any) -> Any:
    """The model that transformers quantizes as `config` says."""
    source.save_pretrained(folder / "float")
    options = {"quantization_config": config, "device_map": "cpu", "dtype": source.dtype}
    model = AutoModelForCausalLM.from_pretrained(folder / "float", **options)
    shutil.rmtree(folder / "float")
    return model


def finish(folder: Path, expected: dict[str, Tensor], rounded: Rounded | None = None) -> None:
    """Write the decoded weights and what `rounded` makes of inputs, and remove what a test has no use for."""
    both = {}
    for name, of in (rounded or {}).items():
        inputs = torch.randn(3, expected[name].shape[1])
        both[name] = torch.stack([inputs, of(inputs)])
    save_file({name: weight.contiguous() for name, weight in expected.items()}, folder / "expected.safetensors")
    if both:
        save_file(both, folder / "inputs.safetensors")
    for name in ("generation_config.json", "README.md"):
        (folder / name).unlink(missing_ok=True)
    for file in folder.iterdir():
        file.chmod(0o644)


def hqq(folder: Path) -> None:
    """Groups of inputs (axis=1) by transformers; each linear of the block has another width."""
    from transformers import HqqConfig

    widths = dict(zip(TAGS, (8, 4, 3, 2, 1, 6, 1.58), strict=True))
    settings: dict[str, Any] = {tag: {"nbits": bits, "group_size": 16, "axis": 1} for tag, bits in widths.items()}
    settings["self_attn.k_proj"]["view_as_float"] = True
    model = loaded(llama().half(), folder, HqqConfig(dynamic_config=settings))
    model.save_pretrained(folder)
    finish(folder, {name: hqq_decoded(module) for name, module in linears(model).items()})


def hqq_without(folder: Path) -> None:
    """By hqq, without settings in config.json: groups across rows (axis=0), and groups of inputs longer than a row."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from hqq.models.hf.base import AutoHQQHFModel

    model = llama().bfloat16()
    settings = zip(TAGS, (8, 4, 3, 2, 1, 4, 4), (16, 16, 16, 16, 16, 64, 128), (0, 0, 0, 0, 0, 1, 1), strict=True)
    by_tag = {tag: BaseQuantizeConfig(nbits=bits, group_size=size, axis=axis) for tag, bits, size, axis in settings}
    expected = {}
    for name, linear in linears(model).items():
        tag = next(tag for tag in TAGS if name.endswith(tag))
        quantized = HQQLinear(linear, by_tag[tag], compute_dtype=torch.bfloat16, device="cpu")
        expected[name] = hqq_decoded(quantized)
        model.set_submodule(name, quantized)
    folder.rmdir()
    AutoHQQHFModel.save_to_safetensors(model, str(folder))
    finish(folder, expected)


def hqq_decoded(module: Any) -> Tensor:
    from hqq.core.quantize import Quantizer

    meta = module.meta | {part: module.meta[part].float() for part in ("scale", "zero")}
    weight: Tensor = Quantizer.dequantize(module.W_q, meta | {"compute_dtype": torch.float32})
    return weight


def quanto(folder: Path) -> None:
    """All types of weights: those of 4 and 2 bits in groups of 32, or in rows where K is at most 128; inputs too."""
    from optimum.quanto import QuantizedModelForCausalLM, freeze, qfloat8, qfloat8_e5m2, qint2, qint4, qint8, quantize

    model = llama(hidden_size=16, intermediate_size=160, num_hidden_layers=2)
    types = (qint8, qfloat8, qint4, qint2, qfloat8_e5m2, qint8, qint4)
    for tag, kind in zip(TAGS, types, strict=True):
        quantize(model, weights=kind, include=f"*.0.{tag}")
    quantize(model, weights=qint2, include="*.1.mlp.down_proj")
    quantize(model, weights=qint8, include="lm_head")
    for tag, kind, scale in (("self_attn.q_proj", qint8, 0.02), ("self_attn.k_proj", qfloat8, 0.005)):
        quantize(model, weights=qint8, activations=kind, include=f"*.1.{tag}")
        model.get_submodule(f"model.layers.1.{tag}").input_scale = torch.tensor(scale)  # as calibration sets it
    freeze(model)
    QuantizedModelForCausalLM(model).save_pretrained(folder)
    modules = {name: model.get_submodule(name) for name in json.loads((folder / "quanto_qmap.json").read_text())}
    rounded = {name: functools.partial(quanto_rounded, part) for name, part in modules.items() if part.activation_qtype}
    finish(folder, {name: module.weight.dequantize() for name, module in modules.items()}, rounded)


def quanto_rounded(module: Any, inputs: Tensor) -> Tensor:
    rounded: Tensor = module.quantize_input(module, (inputs,)).dequantize()
    return rounded


def torchao(folder: Path) -> None:
    """Integers in the first block, FP8 in the second, with all granularities; inputs at run time and calibrated."""
    from torchao.quantization import Float8Tensor, Int8WeightOnlyConfig, quantize_
    from transformers import TorchAoConfig

    source = llama(num_hidden_layers=2).bfloat16()
    model = loaded(source, folder, TorchAoConfig(Int8WeightOnlyConfig()))
    *configs, head = torchao_integers()
    for tag, config, options in zip(TAGS, configs, torchao_floats(), strict=True):
        first, second = (source.get_submodule(f"model.layers.{layer}.{tag}") for layer in (0, 1))
        quantize_(first, config)
        model.set_submodule(f"model.layers.0.{tag}", first)
        small = Float8Tensor.from_hp(second.weight.data, **options)
        model.get_submodule(f"model.layers.1.{tag}").weight = nn.Parameter(small, requires_grad=False)
    quantize_(source.lm_head, head)
    model.lm_head = source.lm_head
    model.save_pretrained(folder)
    weights = {name: module.weight for name, module in {**linears(model), "lm_head": model.lm_head}.items()}
    rounded = {name: functools.partial(torchao_rounded, weight) for name, weight in weights.items() if rounds(weight)}
    finish(folder, {name: torchao_decoded(weight) for name, weight in weights.items()}, rounded)


def torchao_integers() -> list[Any]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig as Dynamic
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig as DynamicIntx
    from torchao.quantization import Int8StaticActivationInt8WeightConfig as Static
    from torchao.quantization import Int8WeightOnlyConfig as Int8
    from torchao.quantization import IntxWeightOnlyConfig as Intx
    from torchao.quantization import MappingType, PerGroup, PerRow, PerTensor

    scale, zero_point = torch.tensor([[0.02]]), torch.tensor([[-7]], dtype=torch.int8)
    static: dict[str, Any] = {"act_quant_scale": scale, "granularity": [PerTensor(), PerRow()]}
    return [
        Int8(),
        Int8(granularity=PerGroup(16)),
        Dynamic(),
        Dynamic(act_mapping_type=MappingType.ASYMMETRIC, reduce_range=True),
        Static(**static),
        Static(act_quant_zero_point=zero_point, act_mapping_type=MappingType.ASYMMETRIC, **static),
        Intx(weight_dtype=torch.int3, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC),
        DynamicIntx(weight_dtype=torch.int4, weight_granularity=PerGroup(16)),
    ]


def torchao_floats() -> list[dict[str, Any]]:
    from torchao.quantization import PerBlock, PerGroup, PerRow, PerTensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs as Inputs

    return [
        {"granularity": PerRow()},
        {"granularity": PerTensor()},
        {"granularity": PerGroup(16)},
        {"granularity": PerBlock([16, 16])},
        {"granularity": PerRow(), "act_quant_kwargs": Inputs()},
        {"granularity": PerTensor(), "act_quant_kwargs": Inputs(granularity=PerTensor())},
        {"granularity": PerRow(), "float8_dtype": torch.float8_e5m2},
    ]


def torchao_blocks(folder: Path) -> None:
    """MXFP4, MXFP8 and NVFP4, with scales in rows, and in one or more of the tiles that kernels of GPUs read."""
    from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, QuantizeTensorToNVFP4Kwargs
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import TorchAoConfig

    source = llama(intermediate_size=160).bfloat16()
    model = loaded(source, folder, TorchAoConfig(Int8WeightOnlyConfig()))
    fp4, whole = torch.float4_e2m1fn_x2, torch.tensor(0.0002)
    calibrated = {"act_quant_kwargs": QuantizeTensorToNVFP4Kwargs(), "act_per_tensor_scale": torch.tensor(0.002)}
    floor = QuantizeTensorToMXKwargs(elem_dtype=torch.float8_e4m3fn)
    makers: tuple[Callable[[Tensor], Tensor] | Any, ...] = (
        lambda weight: MXTensor.to_mx(weight, fp4, 32),
        lambda weight: NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=whole, **calibrated),
        NVFP4Tensor.to_nvfp4,
        lambda weight: MXTensor.to_mx(weight, torch.float8_e4m3fn, 32, act_quant_kwargs=floor),
        MXDynamicActivationMXWeightConfig(activation_dtype=fp4, weight_dtype=fp4),
        MXDynamicActivationMXWeightConfig(),
        NVFP4WeightOnlyConfig(),
    )
    for tag, make in zip(TAGS, makers, strict=True):
        linear = source.get_submodule(f"model.layers.0.{tag}")
        if callable(make):
            linear.weight = nn.Parameter(make(linear.weight.data), requires_grad=False)
        else:
            quantize_(linear, make)
        model.set_submodule(f"model.layers.0.{tag}", linear)
    model.save_pretrained(folder)
    weights = {name: module.weight for name, module in linears(model).items()}
    with_inputs = {name: weight for name, weight in weights.items() if rounds(weight)}
    rounded = {name: functools.partial(torchao_block_rounded, weight) for name, weight in with_inputs.items()}
    finish(folder, {name: weight.dequantize(torch.float32) for name, weight in weights.items()}, rounded)


def torchao_block_rounded(weight: Any, inputs: Tensor) -> Tensor:
    kind, settings = type(weight), weight.act_quant_kwargs
    if hasattr(weight, "act_per_tensor_scale"):
        rounded: Tensor = kind.to_nvfp4(inputs, per_tensor_scale=weight.act_per_tensor_scale).dequantize()
        return rounded
    rounded = kind.to_mx(inputs, settings.elem_dtype, settings.block_size, settings.scaling_mode).dequantize()
    return rounded


def torchao_decoded(weight: Any) -> Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor as Intx

    if not isinstance(weight, Intx):
        decoded: Tensor = weight.dequantize(torch.float32)
        return decoded
    codes = weight.qdata, weight.scale.float(), weight.zero_point, weight.target_dtype, weight.block_size
    decoded = Intx(*codes, torch.float32, None).dequantize()
    return decoded


def rounds(weight: Any) -> bool:
    """Whether the linear of a weight of torchao rounds its inputs."""
    return any(getattr(weight, part, None) is not None for part in ("act_quant_kwargs", "activation_quantization"))


def torchao_rounded(weight: Any, inputs: Tensor) -> Tensor:
    from torchao.quantization.quantize_.common import _choose_quant_func_and_quantize_tensor as choose
    from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as intx

    if getattr(weight, "activation_quantization", None) is not None:
        return intx._apply_int8_act_asym_per_token_quant_dequant(inputs)
    calibrated = {part: getattr(weight, f"act_quant_{part}", None) for part in ("scale", "zero_point")}
    calibrated = {part: tensor for part, tensor in calibrated.items() if tensor is not None}
    rounded: Tensor = choose(inputs, weight.act_quant_kwargs, **calibrated).dequantize(torch.float32)
    return rounded


if __name__ == "__main__":
    makers = {make.__name__: make for make in (hqq, hqq_without, quanto, torchao, torchao_blocks)}
    root, *names = sys.argv[1:]
    for name in names:
        (Path(root) / name).mkdir()
        makers[name](Path(root) / name)
