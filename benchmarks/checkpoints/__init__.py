"""Quantized models as other tools write them, for a table of checkpoints."""
