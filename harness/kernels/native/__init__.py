"""Kernels in C++ for CPUs, built by setup.py where a compiler is: the library, and the kernels of each format family.

`library` loads the operators; `panels` is the order of the codes; `grouped` runs formats with a scale per group, `int8`
quantized inputs, `additive` sums of codebook vectors, `incoherent` lattice codes of rotated weights.
"""
