"""The report: all runs of a folder in one HTML file that needs no network; `python -m harness.report`."""
