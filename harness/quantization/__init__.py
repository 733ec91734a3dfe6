"""Applies a method to a model, block by block. `runs` calls `check`, then `quantize`; methods import only core."""

from harness.quantization.engine import check as check
from harness.quantization.engine import quantize as quantize
from harness.quantization.result import Result as Result
