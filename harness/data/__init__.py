"""Text in, token windows out: corpora and local files for evaluation and calibration. Called by `runs`."""

from harness.data.corpora import identity as identity
from harness.data.windows import Tokens as Tokens
from harness.data.windows import calibration as calibration
from harness.data.windows import check_overlap as check_overlap
from harness.data.windows import evaluation as evaluation
