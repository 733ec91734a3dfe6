"""Checkpoint formats, one module for each, which writes and reads quantized models. `runs` calls them for `save=`."""
