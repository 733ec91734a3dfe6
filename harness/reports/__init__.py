"""Records in, tables and reports out: one pandas frame, which tables, comparisons and the HTML report read."""
