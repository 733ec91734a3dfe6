"""The contract of methods, and what they work with: schemes, quantized weights, statistics, input groups.

Knows nothing but torch. Methods import from here alone; the rest of the harness does too.
"""

from harness.core.block import Block as Block
from harness.core.checks import above_zero as above_zero
from harness.core.checks import at_least as at_least
from harness.core.collected import AbsMean as AbsMean
from harness.core.collected import Drift as Drift
from harness.core.collected import Hessian as Hessian
from harness.core.collected import MinMax as MinMax
from harness.core.collected import Sample as Sample
from harness.core.formats.floating_activation import FloatActivation as FloatActivation
from harness.core.formats.floating_weight import FloatQTensor as FloatQTensor
from harness.core.formats.floating_weight import FloatWeight as FloatWeight
from harness.core.formats.format import ActivationFormat as ActivationFormat
from harness.core.formats.format import Format as Format
from harness.core.formats.format import WeightFormat as WeightFormat
from harness.core.formats.integer import IntFormat as IntFormat
from harness.core.formats.integer_activation import IntActivation as IntActivation
from harness.core.formats.integer_weight import IntQTensor as IntQTensor
from harness.core.formats.integer_weight import IntWeight as IntWeight
from harness.core.formats.kv import KVFormat as KVFormat
from harness.core.formats.kv import LayeredKV as LayeredKV
from harness.core.formats.learned_weight import LearnedWeight as LearnedWeight
from harness.core.formats.levels_weight import LevelsQTensor as LevelsQTensor
from harness.core.formats.levels_weight import LevelsWeight as LevelsWeight
from harness.core.formats.qtensor import QTensor as QTensor
from harness.core.formats.rounding import round_to_nearest as round_to_nearest
from harness.core.groups import InputGroup as InputGroup
from harness.core.groups import Producer as Producer
from harness.core.method import Distillation as Distillation
from harness.core.method import Finetune as Finetune
from harness.core.method import Finetuned as Finetuned
from harness.core.method import Method as Method
from harness.core.method import Rotation as Rotation
from harness.core.method import chooses as chooses
from harness.core.method import overrides as overrides
from harness.core.prequantized import Prequantized as Prequantized
from harness.core.residual import Residual as Residual
from harness.core.residual import Turn as Turn
from harness.core.scheme import Scheme as Scheme
from harness.core.scheme import require_none as require_none
from harness.core.stats import Stat as Stat
from harness.core.stats import Stats as Stats
