"""Token windows for evaluation and calibration, made from corpora or local text files.

`runs` calls it: the windows of a run, the check for overlap, and the identity of the texts for the run id.
"""

from harness.data.corpora import identity as identity
from harness.data.windows import Tokens as Tokens
from harness.data.windows import calibration as calibration
from harness.data.windows import check_overlap as check_overlap
from harness.data.windows import evaluation as evaluation
