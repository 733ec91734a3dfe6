"""Decoder blocks run one by one on calibration tokens, and the statistics of what their linears read."""
