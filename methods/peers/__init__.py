"""Quantized layers of other libraries, in their native formats, as methods: a reference for results of this project."""
