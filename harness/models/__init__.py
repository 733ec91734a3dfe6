"""Sources of models, checkpoints of quantized models, and the decoder blocks and linears of a loaded model.

`runs` opens a model once, as a Source, and passes it on. After loading, `calibration`, `quantization` and `evaluation`
work on its Decoder.
"""

from harness.models.architecture import input_groups as input_groups
from harness.models.architecture import linears_of as linears_of
from harness.models.architecture import matching as matching
from harness.models.architecture import split_skipped as split_skipped
from harness.models.architecture import weight_of as weight_of
from harness.models.decoder import Decoder as Decoder
from harness.models.loading import skeleton as skeleton
from harness.models.probe import forward as forward
from harness.models.probe import logits as logits
from harness.models.probe import probe_tokens as probe_tokens
from harness.models.quantized import QuantizedSource as QuantizedSource
from harness.models.quantized import open_quantized as open_quantized
from harness.models.source import Source as Source
from harness.models.source import open as open
from harness.models.tokenizer import Tokenizer as Tokenizer
