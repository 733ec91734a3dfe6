"""Benchmarks of the harness itself; each prints its results and writes them to results/benchmarks."""
