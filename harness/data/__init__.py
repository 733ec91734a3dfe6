"""Text in, token windows out: corpora and local files for evaluation and calibration. Called by `runs`."""
