"""Measurements of the harness itself; each prints what it found and keeps it in results/benchmarks."""
