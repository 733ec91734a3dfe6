"""How good a model is and what it costs: perplexity, divergence, sensitivity, latency, memory, energy. Called by `runs`."""
