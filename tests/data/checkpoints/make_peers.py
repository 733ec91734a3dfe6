"""Writes the checkpoints beside this file, by libraries that quantize: `python make_peers.py FOLDER NAME ...`.

Each has a tiny Llama with random weights; `expected.safetensors` has the weights that the library decodes, in float32
arithmetic, and `inputs.safetensors` inputs of linears with what the library rounds them to: (2, T, K).

The libraries are no dependencies of this project. All ran on processors alone:

    llmcompressor*   llmcompressor 0.14.0.1 with compressed-tensors 0.19.0, transformers 5.17.0, torch 2.14.0
    auto_round*      auto-round 0.16.1 with auto-round-lib 0.16.0, transformers 5.23.0, torch 2.13.0
    gptqmodel*       gptqmodel 7.7.0 with transformers 5.23.0, torch 2.14.1
    autoawq          autoawq 0.2.9 with transformers 4.51.3, torch 2.13.0
    bitsandbytes*    bitsandbytes 0.50.2 with transformers 5.23.0, torch 2.13.0
    modelopt*        nvidia-modelopt 0.47.0 with transformers 5.23.0, torch 2.14.1
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TAGS = (*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in MLP))
KEPT = {"config.json", "model.safetensors"}
VOCABULARY = 32


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape | options))
    model.config.architectures = ["LlamaForCausalLM"]
    return model


def tokenizer() -> Any:
    """A tokenizer of letters, which some libraries ask for."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {chr(ord("a") + i): i for i in range(26)}
    whole = Tokenizer(models.BPE(vocab=letters, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="z", pad_token="z")


def linears(model: Any) -> dict[str, Any]:
    """The linears of the blocks, by name."""
    return {name: module for name, module in model.named_modules() if name.endswith(TAGS)}


def saved(model: Any, folder: Path) -> str:
    """The path of the float model in a folder."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def shorten(folder: Path) -> None:
    """Remove the part of config.json that says how the codes were found."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].pop("meta", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def finish(folder: Path, expected: dict[str, Tensor], rounded: dict[str, Tensor] | None = None) -> None:
    """Write the decoded weights and the rounded inputs, and remove what a test has no use for."""
    for file in folder.iterdir():
        if file.name not in KEPT:
            file.unlink()
    shorten(folder)
    save_file({name: weight.float().contiguous() for name, weight in expected.items()}, folder / "expected.safetensors")
    if rounded:
        save_file(rounded, folder / "inputs.safetensors")


def llmcompressor(folder: Path) -> None:
    """Integers of all kinds, FP8 and MXFP4, with inputs at run time and calibrated."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme

    def integers(bits: int, even: bool, size: int | None = None, **inputs: Any) -> QuantizationScheme:
        strategy = "channel" if size is None else "group"
        common: dict[str, Any] = {"type": "int", "num_bits": bits, "symmetric": even}
        weights = QuantizationArgs(**common, strategy=strategy, group_size=size)
        args = QuantizationArgs(type="int", num_bits=8, **inputs) if inputs else None
        return QuantizationScheme(targets=[], weights=weights, input_activations=args)

    presets = ("W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4A16", "MXFP4A16", "W4A8")
    first = [preset_name_to_scheme(name, []) for name in presets]
    first[3].weights.block_structure, first[3].input_activations.group_size = [16, 16], 16
    first[-1].weights.group_size = 16
    second = [
        integers(4, True, 16),
        integers(4, False, 16),
        integers(3, False, 16),
        integers(8, False, symmetric=False, strategy="token", dynamic=True),
        integers(5, True),
        integers(8, True, symmetric=True, strategy="tensor"),
        integers(8, True, symmetric=False, strategy="tensor"),
    ]
    _llmcompressor(folder, [*first, *second])


def llmcompressor_nvfp4(folder: Path) -> None:
    """NVFP4 with float inputs, and with inputs below a calibrated scale of the tensor."""
    from compressed_tensors.quantization import preset_name_to_scheme

    presets = ("NVFP4A16",) * 3 + ("NVFP4",) * 4
    _llmcompressor(folder, [preset_name_to_scheme(name, []) for name in presets])


def _llmcompressor(folder: Path, schemes: list[Any]) -> None:
    """One scheme for each linear."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    layers = len(schemes) // len(TAGS)
    names = [f"model.layers.{layer}.{tag}" for layer in range(layers) for tag in TAGS]
    groups = {
        f"group_{i}": scheme.model_copy(update={"targets": [f"re:.*{name}$"]})
        for i, (name, scheme) in enumerate(zip(names, schemes, strict=True))
    }
    with tempfile.TemporaryDirectory() as parent:
        source = saved(llama(num_hidden_layers=layers).bfloat16(), Path(parent))
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        tokens = torch.randint(VOCABULARY, (4, 16)).tolist()
        oneshot(
            model=model,
            processor=tokenizer(),
            dataset=Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * 16] * 4}),
            recipe=QuantizationModifier(config_groups=groups, ignore=["lm_head"]),
            num_calibration_samples=4,
            max_seq_length=16,
            pipeline="basic",
        )
        model.save_pretrained(folder, save_compressed=True)
    tensors = load_file(folder / "model.safetensors")
    modules = linears(model)
    schemes = [module.quantization_scheme for module in modules.values()]
    decoded = {name: _compressed_decoded(name, tensors, of) for name, of in zip(modules, schemes, strict=True)}
    finish(folder, decoded, _compressed_inputs(modules, tensors))


def _compressed_decoded(name: str, tensors: dict[str, Tensor], scheme: Any) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    prefix = f"{name}."
    parts = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    parts = {part: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for part, tensor in parts.items()}
    if scheme.weights.type == "float" and scheme.weights.num_bits == 4:
        rows, half = parts["weight_packed"].shape
        values = unpack_fp4_from_uint8(parts["weight_packed"], rows, 2 * half, torch.float32)
        scale = parts["weight_scale"]
        scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
        whole = parts.get("weight_global_scale")
        return dequantize(values, scale, args=scheme.weights, global_scale=whole, dtype=torch.float32)
    weight: Tensor = BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]
    return weight


def _compressed_inputs(modules: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize, forward_quantize

    both = {}
    for name, module in modules.items():
        args = module.quantization_scheme.input_activations
        if args is None:
            continue
        inputs = torch.randn(1, 3, module.in_features)
        if args.dynamic:
            rounded = forward_quantize(module, inputs, "input", args)
        else:
            zero_point = tensors.get(f"{name}.input_zero_point")
            rounded = fake_quantize(inputs, tensors[f"{name}.input_scale"].float(), zero_point, args)
        both[name] = torch.stack([inputs[0], rounded[0]])
    return both


def auto_round(folder: Path, packing: str = "auto_round:auto_gptq", bits: int = 4, symmetric: bool = True) -> None:
    """Rounded to nearest; the layers of auto-round for CPUs decode an identity."""
    from auto_round import AutoRound
    from transformers import AutoRoundConfig

    model = llama(num_key_value_heads=2).half()
    options: dict[str, Any] = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu", "nsamples": 1, "seqlen": 8}
    quantizer = AutoRound(model, tokenizer(), bits=bits, group_size=16, sym=symmetric, **options)
    quantizer.quantize_and_save(str(folder), format=packing)
    nested = next(folder.rglob("model.safetensors")).parent
    for file in nested.iterdir() if nested != folder else []:
        file.rename(folder / file.name)
    for empty in [path for path in folder.iterdir() if path.is_dir()]:
        shutil.rmtree(empty)
    options = {"quantization_config": AutoRoundConfig(), "device_map": "cpu", "dtype": torch.float32}
    loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
    scales = load_file(folder / "model.safetensors")
    expected = {}
    for name, module in linears(loaded).items():
        with torch.inference_mode():
            decoded = module(torch.eye(module.infeatures)).float().t()
        scale = scales[f"{name}.scales"].float().t().repeat_interleave(16, 1)
        expected[name] = (decoded / scale).round() * scale  # its kernels add products in another order
        assert (expected[name] - decoded).norm() < 1e-6 * decoded.norm()
    finish(folder, expected)


def gptqmodel(folder: Path, **options: Any) -> None:
    """By GPTQ; its layer in torch decodes."""
    os.cpu_count = lambda: 8  # type: ignore[assignment]  # its pool of threads refuses fewer processors
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    calibration = [{"input_ids": torch.randint(26, (32,)).tolist(), "attention_mask": [1] * 32} for _ in range(8)]
    with tempfile.TemporaryDirectory() as parent:
        source = saved(llama(num_key_value_heads=2).half(), Path(parent))
        model = GPTQModel.load(source, QuantizeConfig(group_size=16, device="cpu", **options))
        model.quantize(calibration, batch_size=1)
        model.save(str(folder))
    loaded = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
    expected = {}
    for name, module in linears(loaded).items():
        module.scales = module.scales.float()
        expected[name] = module.dequantize_weight().float().t()
    finish(folder, expected)


def autoawq(folder: Path) -> None:
    """Calibrated on random letters; its own function decodes the words."""
    from awq import AutoAWQForCausalLM
    from awq.utils.packing_utils import dequantize_gemm

    size = 16
    texts = ["".join(chr(ord("a") + int(i)) for i in torch.randint(26, (64,))) for _ in range(4)]
    with tempfile.TemporaryDirectory() as parent:
        shape = {"hidden_size": 64, "num_attention_heads": 1}  # it searches clipping for 64 outputs at a time
        source = saved(llama(**shape).half(), Path(parent))
        model = AutoAWQForCausalLM.from_pretrained(source, device_map="cpu", torch_dtype=torch.float16)
        settings = {"zero_point": True, "q_group_size": size, "w_bit": 4, "version": "GEMM"}
        model.quantize(tokenizer(), settings, calib_data=texts, max_calib_seq_len=64, n_parallel_calib_samples=1)
        model.save_quantized(str(folder))
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    for name in linears(model.model):
        words, zeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        expected[name] = dequantize_gemm(words, zeros, scales.float(), 4, size).t()
    finish(folder, expected)


def bitsandbytes(folder: Path, **options: Any) -> None:
    """By transformers."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from transformers import BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as parent:
        shape = {"hidden_size": 64, "num_attention_heads": 4}  # its decoder for processors takes whole blocks of a row
        source = saved(llama(**shape).bfloat16(), Path(parent))
        config = BitsAndBytesConfig(**options)
        loading = {"quantization_config": config, "device_map": "cpu", "dtype": torch.bfloat16}
        model = AutoModelForCausalLM.from_pretrained(source, **loading)
        model.save_pretrained(folder)
    expected = {}
    for name, module in linears(model).items():
        weight = module.weight
        if "load_in_4bit" in options:
            weight.quant_state.dtype = torch.float32
            expected[name] = dequantize_4bit(weight.data, weight.quant_state)
        else:
            expected[name] = int8_vectorwise_dequant(weight.data, weight.SCB)
    finish(folder, expected)


def modelopt(folder: Path, settings: str, cache: str | None = None) -> None:
    """Calibrated on random tokens; `cache` names settings of the KV cache."""
    import copy

    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    def calibrate(model: Any) -> None:
        for _ in range(4):
            model(torch.randint(VOCABULARY, (1, 16)))

    config = copy.deepcopy(getattr(mtq, settings))
    if cache is not None:
        config["quant_cfg"] += getattr(mtq, cache)["quant_cfg"]
    model = mtq.quantize(llama(num_hidden_layers=1 if cache is None else 2), config, calibrate)
    modules = linears(model)
    rounded = {name: _modelopt_rounded(module) for name, module in modules.items() if "NVFP4" not in settings}
    states = {} if cache is None else _modelopt_states(model)
    export_hf_checkpoint(model, export_dir=str(folder))
    tensors = load_file(folder / "model.safetensors")
    finish(folder, {name: _modelopt_decoded(name, tensors) for name in modules}, rounded)
    if states:
        save_file(states, folder / "states.safetensors")


def _modelopt_rounded(module: Any) -> Tensor:
    inputs = torch.randn(1, 3, module.in_features)
    return torch.cat([inputs, module.input_quantizer(inputs)]).detach()


def _modelopt_states(model: Any) -> dict[str, Tensor]:
    """Keys and values (1, heads, T, head_dim) of each layer, with what the library rounds them to: (2, 1, ...)."""
    states = {}
    for i, layer in enumerate(model.model.layers):
        for kind in "kv":
            given = torch.randn(1, 1, 3, 16)
            rounded = getattr(layer.self_attn, f"{kind}_bmm_quantizer")(given)
            states[f"{i}.{kind}"] = torch.stack([given, rounded]).detach()
    return states


def _modelopt_decoded(name: str, tensors: dict[str, Tensor]) -> Tensor:
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
    if f"{name}.weight_scale_2" in tensors:
        shape = torch.Size((len(weight), 2 * weight.shape[1]))
        whole = {"double_scale": tensors[f"{name}.weight_scale_2"], "block_sizes": {-1: 16}}
        decoded: Tensor = NVFP4QTensor(shape, torch.float32, weight).dequantize(torch.float32, scale=scale, **whole)
        return decoded
    scale = scale[:, None] if scale.dim() else scale
    decoded = FP8QTensor(weight.shape, torch.float32, weight).dequantize(torch.float32, scale=scale)
    return decoded


NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
MAKERS: dict[str, Callable[[Path], None]] = {
    "llmcompressor": llmcompressor,
    "llmcompressor_nvfp4": llmcompressor_nvfp4,
    "auto_round_gptq": auto_round,
    "auto_round_awq": lambda folder: auto_round(folder, "auto_round:auto_awq", symmetric=False),
    "auto_round_awq_symmetric": lambda folder: auto_round(folder, "auto_round:auto_awq"),
    "auto_round_gptq_asymmetric": lambda folder: auto_round(folder, symmetric=False),
    "auto_round_plain": lambda folder: auto_round(folder, "auto_round", bits=2, symmetric=False),
    "gptqmodel_act_order": lambda folder: gptqmodel(folder, bits=4, sym=False, desc_act=True),
    "gptqmodel_3_bits": lambda folder: gptqmodel(folder, bits=3, sym=True, desc_act=False),
    "autoawq": autoawq,
    "bitsandbytes_nf4": lambda folder: bitsandbytes(folder, **NF4),
    "bitsandbytes_nf4_double": lambda folder: bitsandbytes(folder, **NF4, bnb_4bit_use_double_quant=True),
    "bitsandbytes_int8": lambda folder: bitsandbytes(folder, load_in_8bit=True),
    "modelopt_fp8": lambda folder: modelopt(folder, "FP8_DEFAULT_CFG"),
    "modelopt_fp8_channel": lambda folder: modelopt(folder, "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    "modelopt_fp8_kv": lambda folder: modelopt(folder, "FP8_DEFAULT_CFG", "FP8_KV_CFG"),
    "modelopt_nvfp4": lambda folder: modelopt(folder, "NVFP4_DEFAULT_CFG"),
}

if __name__ == "__main__":
    root, *names = sys.argv[1:]
    for name in names:
        (Path(root) / name).mkdir()
        MAKERS[name](Path(root) / name)
