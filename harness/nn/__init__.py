"""Modules of a quantized model: QuantLinear and DenseLinear, KV caches that store codes, hooks, and calls of models.

`quantization` and `models` build QuantLinears, `calibration` uses the hooks, `evaluation` and `runs` the caches.
The functions of caches are called through their module: `kvcache.maker`, `kvcache.check`, `kvcache.footprint`.
"""

from harness.nn.calls import accepted as accepted
from harness.nn.calls import cache_of as cache_of
from harness.nn.calls import one_line_errors as one_line_errors
from harness.nn.dense import DenseLinear as DenseLinear
from harness.nn.hooks import first_of as first_of
from harness.nn.hooks import hooked as hooked
from harness.nn.hooks import standing_in as standing_in
from harness.nn.hooks import tensors_of as tensors_of
from harness.nn.kvcache import MakeCache as MakeCache
from harness.nn.linear import QuantLinear as QuantLinear
from harness.nn.linear import replace as replace
from harness.nn.linear import resident_bytes as resident_bytes
from harness.nn.linear import stored_bytes as stored_bytes
from harness.nn.linear import swapped as swapped
from harness.nn.positions import positions as positions
