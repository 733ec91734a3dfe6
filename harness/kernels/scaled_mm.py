"""FP8 weights with FP8 inputs by torch's product of 8-bit floats, on GPUs of compute capability 8.9 and later.

    y = elements_x elements_w^T * scale_x * scale_w + bias        scale_x per token, per sequence, or calibrated

`torch._scaled_mm` takes the inputs row by row and the weight column by column, which is the transpose of how it is
stored, and either one scale for each operand or float32 scales (M, 1) and (1, N) (rowwise). Rowwise, only bfloat16
outputs work on every such GPU; so other dtypes need one scale for the weight and one for each sequence. Both sizes
of the weight must be multiples of 16. Sums are kept in full precision (`use_fast_accum=False`). Elements of the
inputs are those of the simulated format to the bit, computed by torch operators before the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core import FloatActivation, FloatQTensor
from harness.core.formats import InputQuantizer
from harness.kernels.base import Kernel

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ROWWISE = torch.bfloat16
_STEP = 16
_CAPABILITY = (8, 9)


def supports(weight: FloatQTensor, quantizer: InputQuantizer, dtype: torch.dtype) -> bool:
    """Whether `ScaledMM` computes exactly this format: E4M3 on both sides, one scale per row or tensor, no outliers."""
    fmt = quantizer.fmt
    return (
        type(weight) is FloatQTensor
        and isinstance(fmt, FloatActivation)
        and (weight.fmt.element, fmt.element) == ("e4m3", "e4m3")
        and weight.tensor_scale is None
        and tuple(weight.scale.shape) in ((1, 1), (weight.shape[0], 1))
        and fmt.granularity in ("token", "tensor")
        and not fmt.tensor_scale
        and fmt.threshold is None
        and not any(size % _STEP for size in weight.shape)
        and dtype in _DTYPES
        and (dtype == _ROWWISE or (len(weight.scale) == 1 and fmt.granularity == "tensor"))
        and capable(weight.qweight.device)
    )


def capable(device: torch.device) -> bool:
    """Whether the device multiplies 8-bit floats, and this torch has the operator."""
    if not hasattr(torch, "_scaled_mm") or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= _CAPABILITY


class ScaledMM(Kernel):
    """One E4M3 weight (N, K) with its scales (1, N), or (1, 1), in float32; inputs are quantized by `quantizer`."""

    weight: Tensor
    scale: Tensor
    name = "scaled_mm"
    quantizes_inputs = True

    def __init__(self, weight: FloatQTensor, quantizer: InputQuantizer, dtype: torch.dtype) -> None:
        """Raises: ValueError if `supports` returns False."""
        super().__init__(weight.shape)
        if not supports(weight, quantizer, dtype):
            raise ValueError(
                f"kernel=scaled_mm does not support {weight.fmt} {weight.shape} with {quantizer.fmt} in {dtype} on "
                f"{weight.qweight.device}; expected E4M3 weights and inputs, a scale per row or tensor, sizes that are "
                "multiples of 16, bfloat16 unless each has one scale, and a GPU of compute capability 8.9 or later"
            )
        self.quantizer = quantizer
        self.register_buffer("weight", weight.qweight)
        self.register_buffer("scale", weight.scale.float().reshape(1, -1))

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        if not inputs.numel():
            return inputs.new_empty(*inputs.shape[:-1], self.shape[0])
        codes, scale = self.quantizer.encode(inputs)
        if inputs.dtype != _ROWWISE and scale.numel() > 1:  # of sequences: one call for each
            return torch.stack([self._product(*one, bias, inputs.dtype) for one in zip(codes, scale, strict=True)])
        return self._product(codes, scale, bias, inputs.dtype)

    def _product(self, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The outputs (..., N) in `dtype` of elements (..., K) with a scale that broadcasts against them."""
        N, K = self.shape
        scales = scale, self.scale
        if scale.numel() > 1 or self.scale.numel() > 1:
            # With a last axis of its own, whose stride is 1 also where there is one row.
            rows = scale.expand(*codes.shape[:-1], 1).flatten().contiguous()[:, None]
            scales = rows, self.scale.expand(1, N).contiguous()
        inside = bias if dtype != torch.float32 else None  # the product adds a bias of 16 bits alone
        y: Tensor = torch._scaled_mm(
            codes.reshape(-1, K), self.weight.t(), *scales, bias=inside, out_dtype=dtype, use_fast_accum=False
        )
        if bias is not None and inside is None:
            y = y + bias
        return y.view(*codes.shape[:-1], N)
