"""Applies a method to a model, block by block. `runs` calls `check`, then `quantize`; methods import only core."""

from harness.quantization.adopt import adopt as adopt
from harness.quantization.engine import check as check
from harness.quantization.engine import quantize as quantize
from harness.quantization.head import check_head as check_head
from harness.quantization.head import pack_head as pack_head
from harness.quantization.head import quantize_head as quantize_head
from harness.quantization.result import Result as Result
