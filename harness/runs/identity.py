"""The identity of a run, in two parts: `run_id` identifies what was run, `code` the code that ran it.

A finished run is skipped if both are the same. Another configuration, other weights or another text give another run
id. A change of a module changes the `code` of the runs that reach it, and of no other run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness import data
from harness.config import Decides, JobConfig, RunConfig, decides
from harness.core import Method
from harness.evaluation import compiled
from harness.models import Source
from harness.quantization import mixed
from harness.runs import analysis, run, save
from harness.runs.checks import device_of
from harness.runs.sources import Sources

Json = dict[str, Any]

_PROJECT = Path(run.__file__).parents[2]


def run_id(cfg: RunConfig, source: Source) -> str:
    """A short hash of everything that decides the result of a run: its typed configuration, weights and texts."""
    deciding = _deciding(cfg, _conditions(cfg))
    deciding["fingerprint"] = source.fingerprint
    deciding["device"] = str(device_of(cfg.device))
    deciding["texts"] = [data.identity(cfg.data, "evaluation")]
    if cfg.calibrates:
        deciding["texts"].append(data.identity(cfg.data, "calibration"))
    if cfg.mixes:
        deciding["sensitivity"] = mixed.identity(cfg, source.fingerprint)
        deciding["scheme"]["weight"]["bits"] = None  # chosen for each linear
    return _hash(deciding)


def early_id(raw: Mapping[str, Any]) -> str:
    """A hash of the raw configuration: the run id of a run that fails before its weights and texts are known."""
    fields = {item.name: item for item in (*dataclasses.fields(RunConfig), *dataclasses.fields(JobConfig))}
    never = {name for name, item in fields.items() if decides(item) is Decides.NEVER}
    return _hash({key: value for key, value in raw.items() if key not in never})


def code(cfg: RunConfig, device: str) -> str:
    """A digest of the code that a run of `cfg` reaches on `device` (cpu, cuda): stages, method, formats, kernels."""
    return _sources(cfg).digest(roots(cfg, device), unused(cfg))


def roots(cfg: RunConfig, device: str) -> list[str]:
    """The modules from which the code of a run is followed: the stages, the kernels of the device, and the method."""
    return [run.__name__, f"harness.kernels.{device}", *_method_modules(cfg)]


def unused(cfg: RunConfig) -> set[str]:
    """The modules of optional stages that a run of `cfg` does not enter; their code is left out of the digest."""
    compiles = cfg.measure.runtime == "compiled"
    optional = {analysis: cfg.analyses, mixed: cfg.mixes, save: cfg.save is not None, compiled: compiles}
    return {module.__name__ for module, is_entered in optional.items() if not is_entered}


def _method_modules(cfg: RunConfig) -> Iterator[str]:
    """The modules of the steps' classes, of the classes that they inherit from, and of their statistics."""
    for step in cfg.steps.values():
        for cls in (*type(step).__mro__, *(base for stat in step.needs for base in stat.__mro__)):
            yield cls.__module__


@functools.cache
def _all_sources(places: tuple[Path, ...], packages: frozenset[str]) -> Sources:
    return Sources(places, packages)


def _sources(cfg: RunConfig) -> Sources:
    """The modules of this project, of the packages of the run's methods, and of plug-ins on Python's path."""
    classes = [cls for step in cfg.steps.values() for cls in (type(step), *step.needs)]
    packages = {cls.__module__.partition(".")[0] for cls in (RunConfig, *classes)}
    folders = [Path(entry or ".").resolve() for entry in sys.path]
    return _all_sources((_PROJECT, *(folder for folder in folders if folder.is_dir())), frozenset(packages))


def _conditions(cfg: RunConfig) -> dict[Decides, bool]:
    """Whether a run of `cfg` is one in which fields of each kind decide the result."""
    return {
        Decides.ALWAYS: True,
        Decides.NEVER: False,
        Decides.QUANTIZED: cfg.quantizes,
        Decides.CALIBRATED: cfg.calibrates,
        Decides.ANALYSED: cfg.analyses,
        Decides.MIXED: cfg.mixes,
        Decides.CHANGED: True,  # _deciding leaves out the default
    }


def _deciding(config: Any, conditions: Mapping[Decides, bool]) -> Json:
    """The fields of a configuration that decide the result, as plain values; for a method also its class."""
    fields = {
        item.name: _plain(getattr(config, item.name), conditions)
        for item in dataclasses.fields(config)
        if conditions[decides(item)]
        and not (decides(item) is Decides.CHANGED and getattr(config, item.name) == item.default)
    }
    return fields | ({"class": _class_name(config)} if isinstance(config, Method) else {})


def _plain(value: Any, conditions: Mapping[Decides, bool]) -> Any:
    """A value of a field as JSON has it."""
    if dataclasses.is_dataclass(value):
        return _deciding(value, conditions)
    if isinstance(value, Mapping):  # a list of pairs, because the order of steps decides
        return [[key, _plain(item, conditions)] for key, item in value.items()]
    return [_plain(item, conditions) for item in value] if isinstance(value, tuple | list) else value


def _class_name(step: Method) -> str:
    return f"{type(step).__module__}.{type(step).__qualname__}"


def _hash(deciding: Json) -> str:
    canonical = json.dumps(deciding, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
