"""Small helpers that every other package may use: progress, digests, files, the disk cache, errors, names, hubs.

They contain nothing about models, methods or runs. Each module is imported by its name.
"""
