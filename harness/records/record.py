"""The record of a run: its configuration, how and on which machine it was executed, and its results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Json = dict[str, Any]
SCHEMA = 2  # increase it when a field gets another name or meaning


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The source of the weights.

    name         name of the model
    source       the key that names it in `model`: package, id, path or architecture
    fingerprint  identifies the weights: two runs with the same fingerprint had the same weights
    note         what a reader of the results must know about the weights
    gguf_sha256  hash of the GGUF file, if the weights come from one
    commit       commit on the hub
    format       of a model that another program quantized: its file format, and the formats of its linears
    bits         width of most of its codes; None if the file's format has no such width
    checkpoint   identifies the quantized weights; `fingerprint` is that of the float model, if the run has it
    """

    name: str | None = None
    source: str | None = None
    fingerprint: str | None = None
    note: str | None = None
    gguf_sha256: str | None = None
    commit: str | None = None
    format: str | None = None
    bits: int | None = None
    checkpoint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the model was executed.

    mode            packed: from packed weights; simulated: from dequantized weights; float: the baseline
    device          cpu or cuda:N
    dtype           float type of the model
    baseline_dtype  float type of the float model in ratios and divergences
    kernel          names of the kernels of the packed linears
    joined          number of packed linears that are computed together with others of the same inputs, at one token
    head            name of the kernel that runs a float head; None: the model's own product
    kv              label of the format of the KV cache; None: float
    energy_source   the counter that joules were read from
    """

    mode: Literal["packed", "simulated", "float"] | None = None
    device: str | None = None
    dtype: str | None = None
    baseline_dtype: str | None = None
    kernel: str | None = None
    joined: int | None = None
    head: str | None = None
    kv: str | None = None
    energy_source: str | None = None


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text, and the windows of it that a run reads: `num_windows` of `seq_len` tokens.

    source         the corpus or file
    text_sha256    hash of the whole text
    text_tokens    number of tokens of the whole text
    sampling       how calibration sequences were chosen
    bos            windows that begin with a BOS token: none, first window, every window; each document: BOS begins each
                   document of the text, and windows are cut from them
    bos_id         id of this BOS token
    tokens_sha256  hash of the tokens of all windows
    """

    source: str | None = None
    text_sha256: str | None = None
    text_tokens: int | None = None
    sampling: str | None = None
    bos: str | None = None
    bos_id: int | None = None
    num_windows: int | None = None
    seq_len: int | None = None
    tokens_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The evaluation text with its protocol, and the calibration text if the run reads one."""

    protocol: str | None = None
    evaluation: Text | None = None
    calibration: Text | None = None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The properties in which two machines may differ: versions, processor, threads, commit.

    native  the processor features that the native kernels use, or why there are none
    """

    python: str | None = None
    packages: dict[str, str | None] = field(default_factory=dict)
    platform: str | None = None
    cpu: str | None = None
    cpu_capability: str | None = None
    native: str | None = None
    cores: int | None = None
    threads: int | None = None
    commit: str | None = None
    gpu: str | None = None
    cuda: str | None = None


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The results of the optional analyses.

    sensitivity  a row for each linear or block: the loss that quantizing it causes
    total        the same for the whole model
    outliers     the largest inputs of each linear by channel, before and after rewrites
    mixed        how a width was chosen for each linear
    """

    sensitivity: list[Json] = field(default_factory=list)
    total: Json = field(default_factory=dict)
    outliers: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    mixed: Json = field(default_factory=dict)


@dataclass
class Record:
    """The configuration and the results of a run.

    run_id       identifies everything that decides the result, except the code
    status       ok or failed
    error        the reason of a failure, in one line
    refused      whether the run failed because its configuration does not allow it, before it started
    unsaved      why `save` wrote no model; None if it wrote one, or was not set
    code         digest of the code of the run, or of later code that gave the same bits
    confirmed    the commit of that later code; None if there was none
    config       the resolved configuration, as read by Hydra
    options      the options of steps, engine and analyses that differ from their defaults
    environment  versions, processor, threads and commit
    model        the source of the weights
    execution    how the model was executed
    data         the evaluation text and the calibration text
    metrics      by name; a metric that was not measured is absent, never zero
    window_nll   mean negative log-likelihood of each evaluation window, in nats per token
    window_kl    mean KL divergence of each evaluation window from the float model, in nats per token
    layers       a row for each linear of the decoder blocks; stored in a separate file
    kv           size of the KV cache in MiB, by batch size and length
    analysis     results of the optional analyses
    warnings     what a reader of the results should know
    stages       seconds of each stage
    schema       version of the structure of this record
    """

    run_id: str
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None
    refused: bool = False
    unsaved: str | None = None
    code: str = ""
    confirmed: str | None = None
    config: Json = field(default_factory=dict)
    options: Json = field(default_factory=dict)
    environment: Environment = field(default_factory=Environment)
    model: Weights = field(default_factory=Weights)
    execution: Execution = field(default_factory=Execution)
    data: Texts = field(default_factory=Texts)
    metrics: dict[str, float] = field(default_factory=dict)
    window_nll: list[float] = field(default_factory=list)
    window_kl: list[float] = field(default_factory=list)
    layers: list[Json] = field(default_factory=list)
    kv: list[Json] = field(default_factory=list)
    analysis: Analysis = field(default_factory=Analysis)
    warnings: list[str] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    schema: int = SCHEMA
