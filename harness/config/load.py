"""Builds the typed configuration of a run from the resolved mapping of conf/config.yaml."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from harness.config.build import build
from harness.config.naming import one_source
from harness.config.parts import LimitsConfig
from harness.config.schema import JobConfig, RunConfig
from harness.core import KVFormat, Method, Scheme, chooses, overrides
from harness.utils.errors import Conflict, Refusal, UnknownKey, keys_of, short


def build_limits(cfg: Mapping[str, Any], sweeping: bool) -> LimitsConfig | None:
    """The limits of a run that gets a separate process; None for a run in this process.

    `sweeping` says whether the run is part of a sweep.
    Raises: ValueError, in one line, if `isolate`, `limits` or `objectives` has an invalid value.
    """
    names = [item.name for item in dataclasses.fields(JobConfig)]
    job = build(JobConfig, {name: cfg[name] for name in names if cfg.get(name) is not None}, "")
    isolated = sweeping or job.limits != LimitsConfig() if job.isolate is None else job.isolate
    return job.limits if isolated else None


def build_run(cfg: Mapping[str, Any]) -> RunConfig:
    """Build a RunConfig from the resolved mapping of conf/config.yaml.

    Raises: Refusal, a ValueError of one line, for an unknown key, a wrong type or a value out of range; Conflict for
    values that exclude each other.
    """
    try:
        return _build_run(cfg)
    except UnknownKey as error:  # the key may belong to another part of the configuration
        raise error.among([key for key in keys_of(cfg) if not _is_part(error.argument, key)]) from error


def _build_run(cfg: Mapping[str, Any]) -> RunConfig:
    job_keys = {item.name for item in dataclasses.fields(JobConfig)}
    separate = {"bits", "scheme", "method", "kv", "experiment", *job_keys}
    values = {key: value for key, value in cfg.items() if key not in separate}
    if isinstance(values.get("model"), Mapping):
        values["model"] = one_source(values["model"])
    steps = build_steps(cfg["method"])
    scheme = build(Scheme, cfg["scheme"], "scheme") if steps else None
    warnings: tuple[str, ...] = ()
    if scheme and scheme.weight and cfg["bits"] != (bits := scheme.weight.bits):
        warnings = (f"bits={cfg['bits']} has no effect: scheme={scheme.name} sets scheme.weight.bits={bits}",)
    kv = build(KVFormat, cfg["kv"], "kv") if cfg.get("kv") else None
    extra = {"scheme": scheme, "steps": steps, "kv": kv, "warnings": warnings}
    return build(RunConfig, values, "", extra)


def _is_part(argument: str, key: str) -> bool:
    """Whether `key` stands in the configuration only because of the mistyped KEY=VALUE `argument`."""
    typed = argument.partition("=")[0]
    return key == typed or key.startswith(f"{typed}.")


def build_steps(method: Mapping[str, Any]) -> dict[str, Method]:
    """Build the ordered steps of `method`; the `_target_` of each names its class.

    The last step that overrides `quantize` or `quantize_block` chooses the codes; the steps before it only rewrite the
    model. The last of all may train what was quantized.
    Raises: ValueError if a class cannot be imported or is not a Method, or a step would have nothing to do.
    """
    if method is not None and not isinstance(method, Mapping):
        raise Refusal(f"method={method!r} is not a mapping of steps; expected NAME: {{_target_: module.Class}}")
    steps = {name: _build_step(f"method.{name}", step) for name, step in (method or {}).items()}
    choosers = [name for name, step in steps.items() if chooses(step)]
    last = list(steps).index(choosers[-1]) if choosers else len(steps)
    for i, (name, step) in enumerate(steps.items()):
        rewrites = any(overrides(step, hook) for hook in ("prepare", "rotate", "transform", "adjust"))
        distills = step.distillation is not None and i == len(steps) - 1
        if not distills and ((i < last and not rewrites and len(steps) > 1) or i > last):
            chooser = choosers[-1] if choosers else "rounding"
            raise Conflict(
                f"method={'_'.join(steps)}: step {name} has nothing to do, because {chooser} chooses the codes; "
                "expected steps that rewrite, then one that quantizes, then at most distill"
            )
    return steps


def _build_step(key: str, step: Any) -> Method:
    if not isinstance(step, Mapping):
        raise UnknownKey(f"{key}={step!r}", [])
    if "_target_" not in step:
        raise Refusal(f"{key}={short(step)} has no _target_; expected a mapping with the class, as in conf/method")
    target = step["_target_"]
    try:
        module, _, name = str(target).rpartition(".")
        cls = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # the imported module can raise anything; the user can correct it
        reason = " ".join(str(error.__cause__ or error).split())
        raise Refusal(
            f"{key}._target_={target} cannot be imported ({short(reason)}); expected module.Class on the Python path"
        ) from error
    is_method = isinstance(cls, type) and issubclass(cls, Method)
    parameters = cls.__dict__.get("__dataclass_params__") if is_method else None  # None: the class is not decorated
    if parameters is None or not parameters.frozen:
        raise Refusal(
            f"{key}._target_={target} is not a method; expected a class with @dataclass(frozen=True, kw_only=True) "
            "that inherits from harness.core.Method"
        )
    options = {name: value for name, value in step.items() if name != "_target_"}
    built: Method = build(cls, options, key)
    return built
