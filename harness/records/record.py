"""The record of a run: what was asked for, what ran, on which machine, and the results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Json = dict[str, Any]
SCHEMA = 2  # raise it when a field gets another name or meaning


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where the weights came from: `fingerprint` fixes them, `note` says what a reader has to know about them."""

    name: str | None = None
    source: str | None = None
    fingerprint: str | None = None
    note: str | None = None
    gguf_sha256: str | None = None
    commit: str | None = None


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the model ran. `mode` is packed, simulated or float; `kernel` names what ran the packed linears."""

    mode: Literal["packed", "simulated", "float"] | None = None
    device: str | None = None
    dtype: str | None = None
    baseline_dtype: str | None = None
    kernel: str | None = None
    kv: str | None = None
    energy_source: str | None = None


@dataclass(frozen=True, kw_only=True)
class Text:
    """Windows of a text, `num_windows` of `seq_len` tokens; `text_tokens` counts the tokens of the whole text."""

    source: str | None = None
    text_sha256: str | None = None
    text_tokens: int | None = None
    sampling: str | None = None
    num_windows: int | None = None
    seq_len: int | None = None
    tokens_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The evaluation text with its protocol, and the calibration text where a run reads one."""

    protocol: str | None = None
    evaluation: Text | None = None
    calibration: Text | None = None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What two machines may differ in: versions, processor, threads, commit."""

    python: str | None = None
    packages: dict[str, str | None] = field(default_factory=dict)
    platform: str | None = None
    cpu: str | None = None
    cpu_capability: str | None = None
    cores: int | None = None
    threads: int | None = None
    commit: str | None = None
    gpu: str | None = None
    cuda: str | None = None


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What the error is attributed to, on request.

    sensitivity, total  a row for each linear or block, and the figures of the whole models
    outliers            largest inputs by linear, before and after rewrites
    mixed               the choice of a width for each linear
    """

    sensitivity: list[Json] = field(default_factory=list)
    total: Json = field(default_factory=dict)
    outliers: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    mixed: Json = field(default_factory=dict)


@dataclass
class Record:
    """A run. A metric that was not measured is absent from `metrics`, never zero.

    status     ok or failed, with the reason in `error`
    code       digest of the code that ran it, or of later code that gave the same bits
    confirmed  the commit of that later code; None where there was no need
    config     the resolved configuration, as Hydra gave it
    options    the options of the method's steps and of the engine that are not at their defaults
    window_nll mean negative log likelihood of each window of the text; window_kl its mean KL from the float model
    layers     a row for each linear of the decoder blocks; stored in a file beside the record
    kv         MiB of the KV cache by batch and length, where they were computed
    stages     seconds of each stage
    """

    run_id: str
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None
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
