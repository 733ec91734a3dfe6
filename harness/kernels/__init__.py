"""Matmuls on packed weights: a table that chooses a kernel, and one module per device type and format."""
