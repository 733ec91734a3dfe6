"""Matmuls that run from packed weights: a table that chooses one, and a module for each kind of device and format."""
