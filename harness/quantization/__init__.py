"""A method applied to a model, block by block. `runs` calls `quantize`; methods see only `harness.core`."""
