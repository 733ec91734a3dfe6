"""Formats of weights, inputs and KV caches: how values become codes and back. The only place that rounds.

`format` says what a format is. Integers and small floats are formats of weights, inputs and caches, tables of levels of
weights and caches; the E8 lattice and sums of codebook vectors are quantized weights of their own.
"""

from harness.core.formats.activation import InputQuantizer as InputQuantizer
from harness.core.formats.additive import AdditiveQTensor as AdditiveQTensor
from harness.core.formats.additive import Gather as Gather
from harness.core.formats.calibrated_states import CalibratedStates as CalibratedStates
from harness.core.formats.format import compute_dtype as compute_dtype
from harness.core.formats.incoherent import IncoherentQTensor as IncoherentQTensor
from harness.core.formats.offset import OffsetQTensor as OffsetQTensor
from harness.core.formats.offset import OffsetWeight as OffsetWeight
from harness.core.formats.packing import pack as pack
from harness.core.formats.packing import packed_bytes as packed_bytes
from harness.core.formats.packing import unpack as unpack
from harness.core.formats.params import Params as Params
from harness.core.formats.qtensor import MixedQTensor as MixedQTensor
from harness.core.formats.qtensor import PermutedQTensor as PermutedQTensor
from harness.core.formats.qtensor import ScaledQTensor as ScaledQTensor
from harness.core.formats.qtensor import Tuner as Tuner
from harness.core.formats.states import States as States
from harness.core.formats.states_format import FloatStates as FloatStates
from harness.core.formats.states_format import IntStates as IntStates
from harness.core.formats.states_format import LevelsStates as LevelsStates
from harness.core.formats.weight_tuner import weight_tuner as weight_tuner
