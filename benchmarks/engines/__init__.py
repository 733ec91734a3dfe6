"""Exported folders in other libraries, compared with this project's reading of them; `python -m benchmarks.engines`."""
