"""The report: all runs of a folder in one HTML file that opens without a network; `python -m harness report`."""
