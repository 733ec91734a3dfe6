"""Runs decoder blocks one by one on calibration tokens and collects statistics of the inputs of their linears.

`quantization` and `evaluation` replay blocks through a Stream; `proofs` defines when two results count as the same.
"""

from harness.calibration.backward import backward as backward
from harness.calibration.importance import Importance as Importance
from harness.calibration.observer import Observer as Observer
from harness.calibration.proofs import PROBE_TOKENS as PROBE_TOKENS
from harness.calibration.proofs import SAME_FUNCTION as SAME_FUNCTION
from harness.calibration.proofs import SAME_LOGITS as SAME_LOGITS
from harness.calibration.proofs import SAME_NLL as SAME_NLL
from harness.calibration.proofs import SAME_TURNED as SAME_TURNED
from harness.calibration.proofs import Limits as Limits
from harness.calibration.proofs import relative_error as relative_error
from harness.calibration.proofs import within as within
from harness.calibration.reference import Reference as Reference
from harness.calibration.replay import Stream as Stream
from harness.calibration.replay import verify as verify
from harness.calibration.shortcut import shortcuts as shortcuts
from harness.calibration.survey import Surveyed as Surveyed
from harness.calibration.survey import groups_of as groups_of
from harness.calibration.survey import survey as survey
from harness.calibration.tail import Tail as Tail
from harness.calibration.tail import after_blocks as after_blocks
