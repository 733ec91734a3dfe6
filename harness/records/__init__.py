"""Results: the record of a run, where it is stored, the metrics that it holds, and what a sweep leaves behind."""
