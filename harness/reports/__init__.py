"""Records in, tables and reports out: one pandas frame, which tables, comparisons and the HTML report read.

`cli` calls it for each of its commands. Reports read records and the registry of metrics, and run nothing. `html` is
imported separately, since it needs the libraries of the extra `report`.
"""

from harness.reports.attribution import analysed as analysed
from harness.reports.attribution import ranking_sheet as ranking_sheet
from harness.reports.compare import comparison_sheet as comparison_sheet
from harness.reports.describe import label as label
from harness.reports.frame import to_frame as to_frame
from harness.reports.kv_table import kv_sheet as kv_sheet
from harness.reports.markdown import write_into as write_into
from harness.reports.render import FORMATS as FORMATS
from harness.reports.render import Sheet as Sheet
from harness.reports.render import as_markdown as as_markdown
from harness.reports.render import emit as emit
from harness.reports.seeds import mean_over_seeds as mean_over_seeds
from harness.reports.sweep_table import sweeps_sheet as sweeps_sheet
from harness.reports.table import show as show
from harness.reports.table import to_markdown as to_markdown
from harness.reports.table import to_sheet as to_sheet
from harness.reports.verdict import Figure as Figure
from harness.reports.verdict import Report as Report
