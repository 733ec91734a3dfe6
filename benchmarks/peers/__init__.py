"""Whole models of other libraries against this project's, on the same weights; `python -m benchmarks.peers`."""
