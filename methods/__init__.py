"""Quantization methods, one idea in each file; the harness loads them only through `_target_` in conf/method."""
