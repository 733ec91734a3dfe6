"""Checkpoint formats, one module for each.

`native` writes and reads models of this project; `runs` calls it for `save=`. The others read checkpoints that other
programs quantized: `detect` finds the format of a folder, its `Reader` gives the linears, and `models.quantized` puts
them into a model.
"""
