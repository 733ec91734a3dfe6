"""How good a model is and what it costs: perplexity, divergence, latency, memory, energy, sensitivity of linears.

`runs` calls an Assessment, stage by stage, and the analyses.
"""

from harness.evaluation.assess import Assessment as Assessment
