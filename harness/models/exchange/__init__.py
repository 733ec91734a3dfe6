"""Checkpoint formats, one module for each: what `save=` writes, and what is read back."""
