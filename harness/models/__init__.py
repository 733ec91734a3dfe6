"""Models in, checkpoints in and out: where weights come from, and the decoder blocks and linears that a model has."""
