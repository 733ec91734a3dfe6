"""ptqbench: a benchmark and evaluation harness for post-training quantization of language models."""

__version__ = "0.1.0"
