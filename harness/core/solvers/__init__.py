"""Numerical parts that several methods share: clipping, damping, k-means, and the fit of additive codebooks."""
