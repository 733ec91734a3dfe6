"""The kernel benchmark: `python -m harness.kernels.bench`."""
