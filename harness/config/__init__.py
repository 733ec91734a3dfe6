"""The typed configuration of a run: its classes, and how they are built from Hydra's mapping. Read by every layer above."""
