"""The modules that a method author reads: schemes, the grid, packed tensors, statistics and the contract."""
