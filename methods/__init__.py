"""Quantization methods, one idea a file; the harness finds them through `_target_` alone."""
