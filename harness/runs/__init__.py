"""One run, from its configuration to its record: its identity, its stages and its process.

`cli` calls this package for each run of a sweep. Only this package adds results to a record.
"""

from harness.runs.execute import execute_run as execute_run
from harness.runs.execute import failed_run as failed_run
from harness.runs.execute import refused_run as refused_run
from harness.runs.isolate import execute_isolated as execute_isolated
from harness.runs.moved import moved as moved
from harness.runs.moved import stamped as stamped
from harness.runs.stale import stale_ids as stale_ids
