"""bitsandbytes' layers: int8 with outlier channels as floats, and 4-bit codebooks in blocks, run by its own matmuls.

Paper: LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339, section 3; NF4, FP4 and double quantization, Dettmers et al.
    2023, arXiv 2305.14314, section 3. The arithmetic is bitsandbytes' (MIT): Linear8bitLt, and Linear4bit.
Differs: bitsandbytes takes a token's scale from all its values below the threshold, where the paper leaves whole
    outlier channels out. Here those channels are one sequence's, where Linear8bitLt takes the whole batch's. 4-bit
    layers run from what was stored, in the inputs' float type; on a CPU with AVX512-BF16, Linear4bit would first
    repack itself with bfloat16 scales and compute in bfloat16.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.core import grid
from harness.core.method import Method
from harness.core.qtensor import QTensor
from harness.core.ranges import at_least
from harness.core.scheme import ActivationFormat, Scheme, WeightFormat, require_native
from harness.core.stats import Stats

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every product of inputs that are not float16

_INT8_ROWS = WeightFormat(bits=8, symmetric=True, grid="narrow")
_INT8_TOKENS = ActivationFormat(bits=8, symmetric=True, grid="narrow")
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCK = 256  # scales that share a scale of their own


class BnbInt8QTensor(QTensor):
    """int8 rows as Linear8bitLt stores them: `qweight` (N, K) int8 and the row's largest magnitude `absmax` (N,)."""

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
        found: Tensor = _library().functional.int8_vectorwise_dequant(self.qweight, self.absmax)
        return found.to(dtype)

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """One sequence (T, K) after another: the matmul looks for outlier channels in all tokens that it is given."""
        sequences = inputs.reshape(-1, *inputs.shape[-2:]) if inputs.dim() > 2 else inputs.reshape(1, -1, self.shape[1])
        found = torch.stack([self._matmul(sequence, bias) for sequence in sequences])
        return found.view(*inputs.shape[:-1], self.shape[0])

    def _matmul(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        library = _library()
        state = library.MatmulLtState()
        state.CB, state.SCB = self.qweight, self.absmax
        state.has_fp16_weights = state.is_training = False  # in training, CPUs multiply as floats
        found: Tensor = library.matmul(inputs, self.qweight, state=state, threshold=self.threshold, bias=bias)
        return found


class Bnb4BitQTensor(QTensor):
    """4-bit codes as Linear4bit stores them, in blocks over the flattened weight.

    qweight        (N K / 2, 1) uint8, two codes a byte
    code           (16,) float32, the codebook
    absmax         (blocks,) the block's largest magnitude: float32, or uint8 under double quantization
    nested_absmax, nested_code, offset  what decodes those uint8: (blocks / 256,), (256,) and () float32
    """

    kernel: ClassVar[str] = "bitsandbytes"

    qweight: Tensor
    code: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None

    def __init__(self, qweight: Tensor, state: Any) -> None:
        """`qweight` and its QuantState, as `quantize_4bit` returns them."""
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
        direct = torch.float32 if dtype == torch.float64 else dtype
        found: Tensor = _library().functional.dequantize_4bit(self.qweight, self._state(direct))
        return found.to(dtype)

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        found: Tensor = _library().matmul_4bit(inputs, self.qweight, self._state(inputs.dtype), bias=bias)
        return found

    def _state(self, dtype: torch.dtype) -> Any:
        """The QuantState of the buffers, wherever they are by now; it decodes to `dtype`."""
        make, nested = _library().functional.QuantState, None
        if self.nested_absmax is not None:
            nested = make(self.nested_absmax, code=self.nested_code, blocksize=_NESTED_BLOCK, dtype=torch.float32)
        return make(
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

    threshold  of LLM.int8(), the same as the scheme's; 0 for none
    """

    threshold: float = 6.0

    def __post_init__(self) -> None:
        at_least(self, 0, "threshold")

    def check(self, scheme: Scheme) -> None:
        _library()
        inputs, known = scheme.activation, scheme.weight.scale_dtype
        rows = dataclasses.replace(_INT8_ROWS, scale_dtype=known)  # float32 is stored, whatever the scheme says
        if scheme.weight != rows or inputs is None or dataclasses.replace(inputs, threshold=None) != _INT8_TOKENS:
            raise ValueError(
                f"scheme={scheme.name} is another format than the int8 rows and int8 tokens of bitsandbytes; "
                "use scheme=llm_int8"
            )
        if (inputs.threshold or 0) != self.threshold:
            raise ValueError(
                f"threshold={self.threshold:g} is not scheme.activation.threshold={inputs.threshold}; set both alike"
            )

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        _check_weight(weight)
        half = weight.contiguous().to(torch.float16)
        qweight, absmax, _ = _library().functional.int8_vectorwise_quant(half)
        return BnbInt8QTensor(qweight, absmax, self.threshold)


@dataclass(frozen=True, kw_only=True)
class Bnb4Bit(Method):
    """Base of bitsandbytes' 4-bit codebooks.

    double_quant  store the blocks' scales in 8 bits
    block_size    weights that share a scale
    """

    quant_type: ClassVar[str]

    double_quant: bool = True
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.block_size not in _BLOCK_SIZES:
            raise ValueError(f"block_size={self.block_size} is unknown; expected one of {_BLOCK_SIZES}")

    def check(self, scheme: Scheme) -> None:
        _library()
        require_native(scheme, f"the {self.quant_type} blocks of bitsandbytes")
        if scheme.weight.bits != 4:
            raise ValueError(f"bits={scheme.weight.bits} is not what {self.quant_type} has; use bits=4")

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        _check_weight(weight)
        if weight.device.type == "cpu" and weight.shape[1] % self.block_size:
            raise ValueError(  # as of 0.50.2
                f"block_size={self.block_size} does not divide in_features={weight.shape[1]}, and a block that spans "
                "rows is decoded wrongly by bitsandbytes on CPUs with AVX-512; use a divisor, or skip it"
            )
        qweight, state = _library().functional.quantize_4bit(
            weight.contiguous(),
            blocksize=self.block_size,
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
        )
        return Bnb4BitQTensor(qweight, state)


@dataclass(frozen=True, kw_only=True)
class BnbNF4(Bnb4Bit):
    """Linear4bit with the levels of a normal distribution's quantiles, QLoRA's NF4."""

    quant_type: ClassVar[str] = "nf4"


@dataclass(frozen=True, kw_only=True)
class BnbFP4(Bnb4Bit):
    """Linear4bit with 4-bit floats."""

    quant_type: ClassVar[str] = "fp4"


def _library() -> ModuleType:
    """bitsandbytes itself.

    Raises: ValueError if it is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"bitsandbytes cannot be imported ({error}); install ptqbench[peers]") from error
    return bitsandbytes


def _check_weight(weight: Tensor) -> None:
    grid.check_finite(weight)
    if weight.dtype == torch.float64:
        raise ValueError("the weight is float64, which bitsandbytes does not take; use model.dtype=float32")
