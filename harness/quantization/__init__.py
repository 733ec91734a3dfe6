"""A method applied to a model, block by block. `runs` calls `check`, then `quantize`; methods see only core."""

from harness.quantization.engine import check as check
from harness.quantization.engine import quantize as quantize
from harness.quantization.result import Result as Result
