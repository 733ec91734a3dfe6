"""Layers of bitsandbytes: int8 with outlier channels as floats, and 4-bit codebooks in blocks, with its own kernels.

Paper: LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339, section 3; NF4, FP4 and double quantization, Dettmers et al.
    2023, arXiv 2305.14314, section 3. The arithmetic is that of bitsandbytes (MIT license), classes Linear8bitLt
    and Linear4bit.
Differs: bitsandbytes computes a token's scale from all its values below the threshold; the paper excludes whole outlier
    channels. Here outlier channels are detected in each sequence; Linear8bitLt detects them in the whole batch. 4-bit
    layers compute from the stored tensors in the float type of the inputs; on a CPU with AVX512-BF16, Linear4bit would
    first repack its weight with bfloat16 scales and compute in bfloat16.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.core import (
    IntActivation,
    IntWeight,
    LevelsWeight,
    Method,
    QTensor,
    Scheme,
    Stats,
    WeightFormat,
    at_least,
)
from harness.core.finite import check_finite
from harness.core.formats.additive import half

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every product whose inputs are not float16

_INT8_ROWS = IntWeight(bits=8, symmetric=True, grid="narrow")
_INT8_TOKENS = IntActivation(bits=8, symmetric=True, grid="narrow")
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCK = 256  # scales that share a second scale


class BnbInt8QTensor(QTensor):
    """int8 rows as Linear8bitLt stores them.

    qweight  (N, K) int8
    absmax   (N,) the largest magnitude of each row
    """

    kernel: ClassVar[str] = "bitsandbytes"
    quantizes_inputs: ClassVar[bool] = True

    qweight: Tensor
    absmax: Tensor

    def __init__(self, qweight: Tensor, absmax: Tensor, threshold: float) -> None:
        super().__init__((qweight.shape[0], qweight.shape[1]))
        self.threshold = threshold
        self.register_buffer("qweight", qweight)
        self.register_buffer("absmax", absmax)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        weight: Tensor = _library().functional.int8_vectorwise_dequant(self.qweight, self.absmax)
        return weight.to(dtype)

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply one sequence (T, K) at a time: the kernel searches all its tokens for outlier channels."""
        sequences = inputs.reshape(-1, *inputs.shape[-2:]) if inputs.dim() > 2 else inputs.reshape(1, -1, self.shape[1])
        outputs = torch.stack([self._matmul(sequence, bias) for sequence in sequences])
        return outputs.view(*inputs.shape[:-1], self.shape[0])

    def _matmul(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        library = _library()
        state = library.MatmulLtState()
        state.CB, state.SCB = self.qweight, self.absmax
        state.has_fp16_weights = state.is_training = False  # in training mode, the CPU kernel multiplies floats
        outputs: Tensor = library.matmul(inputs, self.qweight, state=state, threshold=self.threshold, bias=bias)
        return outputs


class Bnb4BitQTensor(QTensor):
    """4-bit codes as Linear4bit stores them, in blocks over the flattened weight.

    qweight        (N K / 2, 1) uint8, two codes in each byte
    code           (16,) float32, the codebook
    absmax         (blocks,) the largest magnitude of each block: float32, or uint8 with double quantization
    nested_absmax, nested_code, offset  float32 (blocks / 256,), (256,) and (); they decode a uint8 `absmax`
    """

    kernel: ClassVar[str] = "bitsandbytes"

    qweight: Tensor
    code: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None

    def __init__(self, qweight: Tensor, state: Any) -> None:
        """Take `qweight` and its QuantState `state` as `quantize_4bit` returns them."""
        super().__init__((state.shape[0], state.shape[1]))
        self.quant_type: str = state.quant_type
        self.block_size: int = state.blocksize
        nested = state.state2
        self.register_buffer("qweight", qweight)
        self.register_buffer("code", state.code)
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("nested_absmax", nested.absmax if nested else None)
        self.register_buffer("nested_code", nested.code if nested else None)
        self.register_buffer("offset", state.offset)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        compute_dtype = torch.float32 if dtype == torch.float64 else dtype
        weight: Tensor = _library().functional.dequantize_4bit(self.qweight, self._state(compute_dtype))
        return weight.to(dtype)

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        outputs: Tensor = _library().matmul_4bit(inputs, self.qweight, self._state(inputs.dtype), bias=bias)
        return outputs

    def _state(self, dtype: torch.dtype) -> Any:
        """Build the QuantState from the buffers, on their current device; it decodes to `dtype`."""
        quant_state, nested = _library().functional.QuantState, None
        if self.nested_absmax is not None:
            nested = quant_state(
                self.nested_absmax, code=self.nested_code, blocksize=_NESTED_BLOCK, dtype=torch.float32
            )
        return quant_state(
            self.absmax,
            shape=torch.Size(self.shape),
            code=self.code,
            blocksize=self.block_size,
            quant_type=self.quant_type,
            dtype=dtype,
            offset=self.offset,
            state2=nested,
        )


@dataclass(frozen=True, kw_only=True)
class BnbInt8(Method):
    """Linear8bitLt without float16 weights.

    threshold  of LLM.int8(), must equal the threshold of the scheme; 0 if the scheme has none
    """

    threshold: float = 6.0

    def __post_init__(self) -> None:
        at_least(self, 0, "threshold")

    def check(self, scheme: Scheme) -> None:
        _library()
        inputs = scheme.activation
        if (
            not _stores_rows(scheme.weight)
            or inputs is None
            or dataclasses.replace(inputs, threshold=None) != _INT8_TOKENS
        ):
            raise ValueError(
                f"scheme={scheme.name} is not the format of bitsandbytes, int8 weight rows and int8 tokens; "
                "use scheme=llm_int8"
            )
        if (inputs.threshold or 0) != self.threshold:
            raise ValueError(
                f"threshold={self.threshold:g} differs from scheme.activation.threshold={inputs.threshold}; "
                "set both to one value"
            )

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        _check_weight(weight)
        float16 = half(weight.contiguous(), "the largest weight")
        qweight, absmax, _ = _library().functional.int8_vectorwise_quant(float16)
        return BnbInt8QTensor(qweight, absmax, self.threshold)


@dataclass(frozen=True, kw_only=True)
class Bnb4Bit(Method):
    """Base of the two 4-bit tables of bitsandbytes, in blocks of 32, 64, 128, ... 4096 values of the flat weight."""

    quant_type: ClassVar[str]

    def check(self, scheme: Scheme) -> None:
        _library()
        fmt = scheme.weight
        if not isinstance(fmt, LevelsWeight) or fmt.table != self.quant_type or fmt.granularity != "flat":
            raise ValueError(
                f"scheme={scheme.name} is another format than the {self.quant_type} blocks of bitsandbytes; use "
                f"scheme={self.quant_type}"
            )
        if fmt.group_size not in _BLOCK_SIZES:
            raise ValueError(
                f"scheme.weight.group_size={fmt.group_size} is unknown to bitsandbytes; expected one of {_BLOCK_SIZES}"
            )

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        fmt = scheme.weight
        assert isinstance(fmt, LevelsWeight)
        _check_weight(weight)
        if weight.device.type == "cpu" and weight.shape[1] % fmt.group_size:
            raise ValueError(  # as of bitsandbytes 0.50.2
                f"scheme.weight.group_size={fmt.group_size} does not divide in_features={weight.shape[1]}, and on CPUs "
                "with AVX-512 bitsandbytes decodes blocks that span rows wrongly; use a divisor, or skip this linear"
            )
        qweight, state = _library().functional.quantize_4bit(
            weight.contiguous(),
            blocksize=fmt.group_size,
            compress_statistics=fmt.double_quant,
            quant_type=self.quant_type,
        )
        return Bnb4BitQTensor(qweight, state)


@dataclass(frozen=True, kw_only=True)
class BnbNF4(Bnb4Bit):
    """Linear4bit with QLoRA's NF4: levels at quantiles of a normal distribution."""

    quant_type: ClassVar[str] = "nf4"


@dataclass(frozen=True, kw_only=True)
class BnbFP4(Bnb4Bit):
    """Linear4bit with 4-bit floats, FP4."""

    quant_type: ClassVar[str] = "fp4"


def _library() -> ModuleType:
    """Import and return bitsandbytes.

    Raises: ValueError if it cannot be imported.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"bitsandbytes cannot be imported ({error}); install ptqbench[peers]") from error
    return bitsandbytes


def _stores_rows(fmt: WeightFormat | None) -> bool:
    """Whether a format is int8 rows; its `scale_dtype` is free, because float32 is always stored."""
    return isinstance(fmt, IntWeight) and dataclasses.replace(fmt, scale_dtype=_INT8_ROWS.scale_dtype) == _INT8_ROWS


def _check_weight(weight: Tensor) -> None:
    check_finite(weight)
    if weight.dtype == torch.float64:
        raise ValueError("the weight is float64, which bitsandbytes does not support; use model.dtype=float32")
