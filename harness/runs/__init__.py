"""One run, from its configuration to its record: its identity, its stages, and the process that it runs in."""
