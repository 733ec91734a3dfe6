"""Results: the record of a run, its files, the registry of metrics, and the log of a sweep.

`runs` writes records, `reports` reads them; `quantization` reads records with sensitivities.
"""

from harness.records.environment import environment as environment
from harness.records.folder import Table as Table
from harness.records.folder import load_records as load_records
from harness.records.folder import load_some as load_some
from harness.records.folder import read_tables as read_tables
from harness.records.folder import runs_of as runs_of
from harness.records.folder import select as select
from harness.records.folder import table_of as table_of
from harness.records.layers import read_layers as read_layers
from harness.records.metrics import LINEAR_METRICS as LINEAR_METRICS
from harness.records.metrics import METRICS as METRICS
from harness.records.metrics import Metric as Metric
from harness.records.metrics import headline as headline
from harness.records.metrics import metric_of as metric_of
from harness.records.metrics import repeats as repeats
from harness.records.record import SCHEMA as SCHEMA
from harness.records.record import Analysis as Analysis
from harness.records.record import Environment as Environment
from harness.records.record import Execution as Execution
from harness.records.record import Record as Record
from harness.records.record import Text as Text
from harness.records.record import Texts as Texts
from harness.records.record import Weights as Weights
from harness.records.store import finished as finished
from harness.records.store import layers_of as layers_of
from harness.records.store import path_of as path_of
from harness.records.store import read as read
from harness.records.store import rescue as rescue
from harness.records.store import usable as usable
from harness.records.store import write as write
