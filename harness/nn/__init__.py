"""Modules that a quantized model consists of: QuantLinear, KV caches that hold codes, and hooks on modules."""
