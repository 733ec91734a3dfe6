"""The contract of methods, and what they work with: schemes, quantized weights, statistics, input groups.

Knows nothing but torch. Methods import from here alone; the rest of the harness does too.
"""

from harness.core.checks import above_zero as above_zero
from harness.core.checks import at_least as at_least
from harness.core.formats.kv import KVFormat as KVFormat
from harness.core.formats.qtensor import IntQTensor as IntQTensor
from harness.core.formats.qtensor import QTensor as QTensor
from harness.core.formats.qtensor import round_to_grid as round_to_grid
from harness.core.formats.qtensor import round_to_nearest as round_to_nearest
from harness.core.groups import InputGroup as InputGroup
from harness.core.groups import Producer as Producer
from harness.core.method import Finetune as Finetune
from harness.core.method import Finetuned as Finetuned
from harness.core.method import Method as Method
from harness.core.method import overrides as overrides
from harness.core.residual import Residual as Residual
from harness.core.residual import Turn as Turn
from harness.core.scheme import NATIVE as NATIVE
from harness.core.scheme import ActivationFormat as ActivationFormat
from harness.core.scheme import IntFormat as IntFormat
from harness.core.scheme import Scheme as Scheme
from harness.core.scheme import WeightFormat as WeightFormat
from harness.core.scheme import require_native as require_native
from harness.core.stats import AbsMean as AbsMean
from harness.core.stats import Hessian as Hessian
from harness.core.stats import MinMax as MinMax
from harness.core.stats import Sample as Sample
from harness.core.stats import Stat as Stat
from harness.core.stats import Stats as Stats
