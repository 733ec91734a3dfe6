"""Small helpers that know nothing of models or runs: progress, digests, files, the disk cache, errors. For everyone."""
