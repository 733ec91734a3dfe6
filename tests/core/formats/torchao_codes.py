"""Codes and scales of torchao for small floats, in torchao_codes.json: torchao writes to stderr when it is imported.

With torchao 0.18.0 installed, `python -m tests.core.formats.torchao_codes` writes the file again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".json")
SHAPE = (16, 64)
ELEMENTS = {
    "mxfp8": torch.float8_e4m3fn,
    "mxfp6": "fp6_e2m3",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp4": torch.float4_e2m1fn_x2,
}


def stored(name: str) -> dict[str, bytes]:
    """The tensors of a format: `scale`, `codes` and, of NVFP4, `whole`."""
    return {part: bytes.fromhex(text) for part, text in json.loads(FILE.read_text())[name].items()}


def weight() -> Tensor:
    """The float32 weight of which the file has the codes; row 3 is zero."""
    return torch.frombuffer(bytearray.fromhex(json.loads(FILE.read_text())["weight"]), dtype=torch.float32).view(SHAPE)


def _hex(values: Tensor) -> str:
    return values.contiguous().view(torch.uint8).numpy().tobytes().hex()


def _write() -> None:
    from torchao.prototype.mx_formats import mx_tensor as mx
    from torchao.prototype.mx_formats import nvfp4_tensor as nv

    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(SHAPE[0], SHAPE[1] // 8, generator=generator).mul(4).exp().repeat_interleave(8, 1)
    values = torch.randn(SHAPE, generator=generator) * spread * 0.02
    values[3] = 0
    written: dict[str, Any] = {"weight": _hex(values)}
    for name, element in ELEMENTS.items():
        for rule, mode in (("floor", mx.ScaleCalculationMode.FLOOR), ("ceil", mx.ScaleCalculationMode.RCEIL)):
            scale, codes = mx.to_mx(values, element, 32, mode)
            written[f"{name}_{rule}"] = {"scale": _hex(scale), "codes": _hex(codes)}
    whole = nv.per_tensor_amax_to_scale(values.abs().amax())
    scale, codes = nv.nvfp4_quantize(values, 16, whole)
    written["nvfp4"] = {"whole": _hex(whole.reshape(1)), "scale": _hex(scale), "codes": _hex(codes)}
    FILE.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    _write()
