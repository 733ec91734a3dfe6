"""Measurements of a model: perplexity, divergence, latency, memory, energy, and the analyses of its linears.

`runs` calls the stages of an Assessment one by one, the peak memory functions around quantization, and the analyses:
`absmax` (largest inputs) and `sensitivity.measure`. Before the perplexity, `warn_of_lookahead` checks its model.
"""

from harness.evaluation.assess import Assessment as Assessment
from harness.evaluation.causality import warn_of_lookahead as warn_of_lookahead
from harness.evaluation.memory import peak_memory_mib as peak_memory_mib
from harness.evaluation.memory import reset_peak_memory as reset_peak_memory
from harness.evaluation.missing import optional as optional
from harness.evaluation.outliers import absmax as absmax
