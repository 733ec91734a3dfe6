"""Results: the record of a run, its files, the metrics that it holds, and what a sweep leaves behind.

`runs` writes records, `reports` reads them; `quantization` reads those with sensitivities.
"""

from harness.records.environment import environment as environment
from harness.records.layers import read_layers as read_layers
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
