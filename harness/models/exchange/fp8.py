"""FP8 checkpoints without a library of their own: DeepSeek's blocks, and ModelOpt's FP8 and NVFP4.

    quant_method fp8   weight float8_e4m3fn, weight_scale_inv one float32 for each block of outputs and inputs, which
                       multiplies; inputs in blocks of a token, at run time
    ModelOpt FP8       weight float8_e4m3fn, weight_scale () or (N,), input_scale (), or inputs at run time, per token
    ModelOpt NVFP4     weight (N, K / 2) uint8, weight_scale float8_e4m3fn, weight_scale_2 (), which multiplies;
                       input_scale (), likewise

Source: DeepSeek-V3, inference/kernel.py; TensorRT-Model-Optimizer, modelopt/torch/export.
"""

from __future__ import annotations

from harness.models.exchange.floats import fp4, fp8
from harness.models.exchange.inputs import dynamic_fp8, nvfp4, static_fp8
from harness.models.exchange.reader import Reader, StoredLinear, bits_of, unsupported

_PER_TOKEN = "FP8_PER_CHANNEL_PER_TOKEN"
_ALGORITHMS = ("FP8", _PER_TOKEN, "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")


class FP8Blocks(Reader):
    """Linears with `weight_scale_inv`."""

    name = "fp8"
    key = "weight_scale_inv"
    parts = ("weight", "weight_scale_inv", "input_scale", "activation_scale")

    def read(self, name: str) -> StoredLinear:
        tensors = self.tensors(name, ("weight",))
        sides = self.section.get("weight_block_size")
        block = None
        if tensors["weight_scale_inv"].numel() > 1 or sides is not None:
            if not isinstance(sides, list) or len(sides) != 2 or sides[0] != sides[1]:
                raise unsupported("weight_block_size", sides, "two equal numbers")
            block = int(sides[0])
        weight = fp8(name, tensors["weight"], tensors["weight_scale_inv"], block)
        if self.section.get("activation_scheme", "dynamic") != "dynamic":
            part = next((part for part in ("input_scale", "activation_scale") if part in tensors), None)
            if part is None:
                raise unsupported("activation_scheme", self.section["activation_scheme"], "dynamic without input_scale")
            inputs = static_fp8(tensors[part])
        else:
            inputs = dynamic_fp8(block)
        return StoredLinear(weight, bits_of(tensors, "input_scale", "activation_scale"), inputs)


class ModelOpt(Reader):
    """Linears with `weight_scale`, and in NVFP4 also `weight_scale_2`."""

    name = "modelopt"
    key = "weight_scale"
    parts = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")

    def read(self, name: str) -> StoredLinear:
        tensors = self.tensors(name, ("weight",))
        if "pre_quant_scale" in tensors:
            raise unsupported("quant_algo", self._algorithm, "one that does not rescale inputs (pre_quant_scale)")
        if self._algorithm not in _ALGORITHMS:
            raise unsupported("quant_algo", self._algorithm, ", ".join(_ALGORITHMS))
        scale = tensors.get("input_scale")
        if "weight_scale_2" in tensors:
            weight = fp4(name, tensors["weight"], tensors["weight_scale"], tensors["weight_scale_2"])
            inputs = None if scale is None else nvfp4(scale)
        else:
            weight = fp8(name, tensors["weight"], tensors["weight_scale"])
            inputs = None if scale is None else static_fp8(scale)
        if self._algorithm == _PER_TOKEN:
            inputs = dynamic_fp8(None)
        return StoredLinear(weight, bits_of(tensors, "input_scale"), inputs)

    @property
    def _algorithm(self) -> str:
        return str(self.section.get("quant_algo")).upper()
