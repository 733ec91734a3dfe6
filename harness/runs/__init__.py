"""One run, from its configuration to its record. `cli` calls it; nothing below knows that there are records of runs."""
