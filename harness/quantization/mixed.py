"""Chooses a weight width for each linear, from a sensitivity run and the rounding error at each width.

The divergence that one quantized linear causes is about quadratic in its output error, so width b of linear i costs
KL_i(b) = KL_i(b0) h_i(b)^2 / h_i(b0)^2, where KL_i(b0) was measured at width b0 and h is the Hessian-weighted error
of rounding to nearest under the scheme at that width. The costs of different linears are added.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.calibration import Surveyed, survey
from harness.config import RunConfig, build
from harness.core import Hessian, Scheme, round_to_nearest
from harness.core.rotated import Rotated
from harness.models import Decoder, split_skipped
from harness.quantization.allocation import Choice, allocate
from harness.quantization.install import hessian_error
from harness.records import Record, read
from harness.utils.disk_cache import DiskCache
from harness.utils.progress import Track, silent

# Divergence in nats that the rounding of logits alone may cause.
_NOISE = {
    "float64": 1e-12,
    "float32": 1e-7,
    "float16": 1e-5,
    "bfloat16": 1e-4,
}
_EXACT = 1e-6  # relative error below which a weight was already on the grid


@dataclass
class Plan:
    """The width of each linear by name, and the predicted result.

    sensitivity      run_id of the sensitivity run that decided the widths
    predicted_kl     sum of the costs, in nats per token
    uniform_kl       the same for one width in all linears, by width, for each width that fits the budget
    bits_per_weight  average of stored bits, as rounding to nearest stores them
    """

    bits: dict[str, int]
    sensitivity: str
    predicted_kl: float
    uniform_kl: dict[int, float]
    bits_per_weight: float
    warnings: list[str] = field(default_factory=list)

    @property
    def summary(self) -> dict[str, Any]:
        """The plan as the record stores it; the bits of each linear are stored in the record's rows."""
        return {key: value for key, value in asdict(self).items() if key not in ("bits", "warnings")}


@dataclass
class _Unit:
    """Linears that get the same width: a single linear, or all linears of a block.

    kl       measured divergence with only this unit quantized
    errors   h of each linear, by width
    stored   stored bits of each linear, by width
    """

    kl: float
    linears: list[str] = field(default_factory=list)
    errors: list[Mapping[int, float]] = field(default_factory=list)
    stored: list[Mapping[int, int]] = field(default_factory=list)

    def squared(self, bits: int) -> float:
        """Mean of h^2 over the linears."""
        return statistics.fmean(errors[bits] ** 2 for errors in self.errors)


def identity(cfg: RunConfig, fingerprint: str) -> dict[str, Any]:
    """Everything that decides a result besides the configuration: the measured sensitivities, and at which width."""
    measured = source(cfg, fingerprint)
    figures = {row["name"]: row["kl_alone"] for row in measured.analysis.sensitivity}
    return {"figures": figures, "at": _measured_at(measured)}


def source(cfg: RunConfig, fingerprint: str) -> Record:
    """The record that `mixed.sensitivity` names; for a folder, its newest record with sensitivities of the same model.

    Raises: ValueError if there is no such record.
    """
    path = Path(str(cfg.mixed.sensitivity))
    files = (
        sorted(path.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True) if path.is_dir() else [path]
    )
    for file in files:
        try:
            record = read(file)
        except ValueError:
            if not path.is_dir():
                raise
            continue
        usable = record.status == "ok" and record.analysis.sensitivity and not record.analysis.mixed
        if usable and record.model.fingerprint == fingerprint:
            return record
    raise ValueError(
        f"mixed.sensitivity={path} holds no finished run with sensitivities of model={cfg.model.name} at one width; "
        "run one first with analysis.sensitivity=linear"
    )


@torch.no_grad()
def plan(
    decoder: Decoder, cfg: RunConfig, measured: Record, tokens: Tensor, cache: DiskCache, track: Track = silent
) -> Plan:
    """Choose the widths of a float model's linears by the sensitivities in the record `measured`.

    The Hessians are those of `tokens` (B, T).
    Raises: ValueError if the record lacks a linear, or the narrowest widths exceed the budget.
    """
    assert cfg.scheme is not None
    assert cfg.mixed.budget is not None
    base = _measured_at(measured)
    names = split_skipped(list(decoder.linears()), cfg.skip, decoder.uncovered())[0]
    units = _units(measured, names)
    observed = survey(decoder, tokens, names, [Hessian], cache, track)
    total = _observe(observed, units, [cfg.scheme.at(bits) for bits in {*cfg.mixed.widths, base}])
    costs, notes = _costs(units, base, _NOISE[str(measured.execution.dtype)])
    curves = {
        name: [
            Choice(b, sum(stored[b] for stored in unit.stored), costs[name] * unit.squared(b)) for b in cfg.mixed.widths
        ]
        for name, unit in units.items()
    }
    budget = cfg.mixed.budget
    try:
        chosen = allocate(curves, budget * total)
    except ValueError as error:
        least = sum(min(choice.stored for choice in curve) for curve in curves.values()) / total
        raise ValueError(
            f"mixed.budget={budget:g} is below the {least:.4g} bits per weight that the narrowest of "
            f"mixed.widths={list(cfg.mixed.widths)} takes, scales included; raise it, or add a narrower width"
        ) from error
    return Plan(
        bits={linear: chosen[name].bits for name, unit in units.items() for linear in unit.linears},
        sensitivity=measured.run_id,
        predicted_kl=sum(choice.cost for choice in chosen.values()),
        uniform_kl=_uniform(curves, budget * total),
        bits_per_weight=sum(choice.stored for choice in chosen.values()) / total,
        warnings=_differences(measured, cfg) + notes,
    )


def over_budget(cfg: RunConfig, layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning if the method exceeds the budget, because it stores more besides the codes than rounding does."""
    assert cfg.mixed.budget is not None
    rows = [row for row in layers if "bits" in row]
    stored = sum(row["stored_bits"] for row in rows) / sum(row["shape"][0] * row["shape"][1] for row in rows)
    if stored <= cfg.mixed.budget:
        return []
    return [
        f"mixed.budget={cfg.mixed.budget:g} is exceeded: the method stores {stored:.4g} bits per weight, scales "
        "included"
    ]


def _uniform(curves: Mapping[str, Sequence[Choice]], budget: float) -> dict[int, float]:
    """The cost of one width for all units, by width, for each width that fits the budget."""
    columns = [list(column) for column in zip(*curves.values(), strict=True)]
    return {
        column[0].bits: sum(choice.cost for choice in column)
        for column in columns
        if sum(choice.stored for choice in column) <= budget
    }


def _units(measured: Record, names: Sequence[str]) -> dict[str, _Unit]:
    """The units of a record that contain any of the linears `names`, each with these linears.

    Raises: ValueError if a linear belongs to no unit.
    """
    units = {
        row["name"].removesuffix(f".{Rotated.INNER}"): _Unit(row["kl_alone"]) for row in measured.analysis.sensitivity
    }
    for name in names:
        owner = next((unit for unit in units if name == unit or name.startswith(f"{unit}.")), None)
        if owner is None:
            raise ValueError(
                f"mixed.sensitivity: run {measured.run_id} has no sensitivity of {name}; measure it with the same "
                "skip, or skip it here too"
            )
        units[owner].linears.append(name)
    return {name: unit for name, unit in units.items() if unit.linears}


def _observe(observed: Surveyed, units: Mapping[str, _Unit], schemes: Sequence[Scheme]) -> int:
    """Fill in each linear's errors and stored bits by width.

    Returns: the number of weights of all linears.
    """
    owner = {linear: unit for unit in units.values() for linear in unit.linears}
    total = 0
    for groups, stats in observed:
        for group, group_stats in zip(groups, stats, strict=True):
            hessian = group_stats[Hessian].value
            for name, weight in group.weights.items():
                rounded = {scheme.format.bits: round_to_nearest(weight, scheme.format) for scheme in schemes}
                owner[name].errors.append({b: hessian_error(weight, q, hessian) for b, q in rounded.items()})
                owner[name].stored.append({b: q.stored_bits for b, q in rounded.items()})
                total += weight.numel()
    return total


def _costs(units: Mapping[str, _Unit], base: int, noise: float) -> tuple[dict[str, float], list[str]]:
    """Each unit's KL per unit of h^2, and warnings about units whose measurement does not determine it."""
    exact = [name for name, unit in units.items() if unit.squared(base) < _EXACT**2]
    within_noise = [name for name, unit in units.items() if name not in exact and unit.kl <= noise]
    costs = {name: max(unit.kl, noise) / unit.squared(base) for name, unit in units.items() if name not in exact}
    median = statistics.median(costs.values()) if costs else 1.0
    notes = []
    if within_noise:
        notes.append(f"mixed: the KL of {_listed(within_noise)} is within rounding noise; {noise:g} nats are assumed")
    if exact:
        notes.append(f"mixed: {_listed(exact)} had no error at {base} bits; the median sensitivity is assumed")
    return costs | dict.fromkeys(exact, median), notes


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _measured_at(measured: Record) -> int:
    """The width at which a record's sensitivities were measured."""
    return build(Scheme, measured.config["scheme"], "scheme").format.bits


def _differences(measured: Record, cfg: RunConfig) -> list[str]:
    """A warning if the sensitivities were measured under another scheme, apart from the width."""
    assert cfg.scheme is not None
    theirs, ours = measured.config["scheme"], asdict(cfg.scheme)
    keys = [key for key in ours["weight"] if key != "bits" and theirs["weight"].get(key) != ours["weight"][key]]
    keys += ["activation"] if (theirs.get("activation") is None) != (ours["activation"] is None) else []
    differing = ", ".join(keys)
    return [f"mixed: run {measured.run_id} measured sensitivities under another scheme ({differing})"] if keys else []
