"""Triton kernels for NVIDIA GPUs: their layout of packed weights, their tile sizes, their launchers."""
