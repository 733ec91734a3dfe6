"""Weight widths linear by linear, by a sensitivity run and the errors that rounding makes at each width.

The divergence that one quantized linear causes is about quadratic in its output error, so a width b of linear i costs
KL_i(b) = KL_i(b0) h_i(b)^2 / h_i(b0)^2, where KL_i(b0) was measured and h is the Hessian-weighted error of rounding to
nearest under the scheme at that width. Costs of different linears are added.
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
from harness.config import RunConfig
from harness.core import Hessian, Scheme, round_to_nearest
from harness.core.rotated import Rotated
from harness.models import Decoder, split_skipped
from harness.quantization.allocation import Choice, allocate
from harness.quantization.install import hessian_error
from harness.records import Record, read
from harness.utils.disk_cache import DiskCache
from harness.utils.progress import Track, silent

_NOISE = {
    "float64": 1e-12,
    "float32": 1e-7,
    "float16": 1e-5,
    "bfloat16": 1e-4,
}  # nats that rounding of logits may feign
_EXACT = 1e-6  # a relative error below which a weight was already on the grid


@dataclass
class Plan:
    """The widths of linears by name, and what is expected of them.

    sensitivity      run_id of the record that they follow from
    predicted_kl     sum of the costs, in nats a token; `uniform_kl` the same by width, for each that fits the budget
    bits_per_weight  average of stored bits, as rounding stores them
    """

    bits: dict[str, int]
    sensitivity: str
    predicted_kl: float
    uniform_kl: dict[int, float]
    bits_per_weight: float
    warnings: list[str] = field(default_factory=list)

    @property
    def summary(self) -> dict[str, Any]:
        """What the record keeps beside each linear's bits."""
        return {key: value for key, value in asdict(self).items() if key not in ("bits", "warnings")}


@dataclass
class _Unit:
    """Linears that get one width: one, or those of a block. `errors` and `stored` are theirs by width."""

    kl: float
    linears: list[str] = field(default_factory=list)
    errors: list[Mapping[int, float]] = field(default_factory=list)
    stored: list[Mapping[int, int]] = field(default_factory=list)

    def squared(self, bits: int) -> float:
        """Mean of h^2 over its linears."""
        return statistics.fmean(errors[bits] ** 2 for errors in self.errors)


def identity(cfg: RunConfig, fingerprint: str) -> dict[str, Any]:
    """What decides a result besides the configuration: the figures of the record that is followed, and their width."""
    followed = source(cfg, fingerprint)
    figures = {row["name"]: row["kl_alone"] for row in followed.analysis.sensitivity}
    return {"figures": figures, "at": _measured_at(followed)}


def source(cfg: RunConfig, fingerprint: str) -> Record:
    """The record that `mixed.sensitivity` names, or the newest in that folder with sensitivities of the same model.

    Raises: ValueError if there is none.
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
        "run it first with analysis.sensitivity=linear"
    )


@torch.no_grad()
def plan(
    decoder: Decoder, cfg: RunConfig, followed: Record, tokens: Tensor, cache: DiskCache, track: Track = silent
) -> Plan:
    """Choose the widths of a float model's linears by the record `followed`, with Hessians of `tokens` (B, T).

    Raises: ValueError if the record lacks a linear, or the budget is under what the narrowest widths take.
    """
    assert cfg.scheme is not None
    assert cfg.mixed.budget is not None
    base = _measured_at(followed)
    names = split_skipped(list(decoder.linears()), cfg.skip)[0]
    units = _units(followed, names)
    seen = survey(decoder, tokens, names, [Hessian], cache, track)
    total = _observe(seen, units, [cfg.scheme.at(bits) for bits in {*cfg.mixed.widths, base}])
    costs, notes = _costs(units, base, _NOISE[str(followed.execution.dtype)])
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
            f"mixed.budget={budget:g} is below the {least:.4g} bits a weight that the narrowest of "
            f"mixed.widths={list(cfg.mixed.widths)} takes, scales included; raise it, or add a narrower width"
        ) from error
    return Plan(
        bits={linear: chosen[name].bits for name, unit in units.items() for linear in unit.linears},
        sensitivity=followed.run_id,
        predicted_kl=sum(choice.cost for choice in chosen.values()),
        uniform_kl=_uniform(curves, budget * total),
        bits_per_weight=sum(choice.stored for choice in chosen.values()) / total,
        warnings=_differences(followed, cfg) + notes,
    )


def over_budget(cfg: RunConfig, layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning if a method stores more beside its codes than rounding, and so exceeds the budget."""
    assert cfg.mixed.budget is not None
    own = [row for row in layers if "bits" in row]
    found = sum(row["stored_bits"] for row in own) / sum(row["shape"][0] * row["shape"][1] for row in own)
    if found <= cfg.mixed.budget:
        return []
    return [
        f"mixed.budget={cfg.mixed.budget:g} is exceeded: the method stores {found:.4g} bits a weight, scales included"
    ]


def _uniform(curves: Mapping[str, Sequence[Choice]], budget: float) -> dict[int, float]:
    """What one width for all would cost, for each that fits the budget."""
    columns = [list(column) for column in zip(*curves.values(), strict=True)]
    return {
        column[0].bits: sum(choice.cost for choice in column)
        for column in columns
        if sum(choice.stored for choice in column) <= budget
    }


def _units(followed: Record, names: Sequence[str]) -> dict[str, _Unit]:
    """The units of a record with the linears `names` that belong to each.

    Raises: ValueError if a linear belongs to none.
    """
    units = {
        row["name"].removesuffix(f".{Rotated.INNER}"): _Unit(row["kl_alone"]) for row in followed.analysis.sensitivity
    }
    for name in names:
        owner = next((unit for unit in units if name == unit or name.startswith(f"{unit}.")), None)
        if owner is None:
            raise ValueError(
                f"mixed.sensitivity: run {followed.run_id} says nothing of {name}; measure it with the same skip, "
                "or skip it here too"
            )
        units[owner].linears.append(name)
    return {name: unit for name, unit in units.items() if unit.linears}


def _observe(seen: Surveyed, units: Mapping[str, _Unit], schemes: Sequence[Scheme]) -> int:
    """Fill in each linear's errors and bits by width; returns the number of weights of all."""
    owner = {linear: unit for unit in units.values() for linear in unit.linears}
    total = 0
    for groups, stats in seen:
        for group, found in zip(groups, stats, strict=True):
            hessian = found[Hessian].value
            for name, weight in group.weights.items():
                rounded = {scheme.weight.bits: round_to_nearest(weight, scheme.weight) for scheme in schemes}
                owner[name].errors.append({b: hessian_error(weight, each, hessian) for b, each in rounded.items()})
                owner[name].stored.append({b: each.stored_bits for b, each in rounded.items()})
                total += weight.numel()
    return total


def _costs(units: Mapping[str, _Unit], base: int, noise: float) -> tuple[dict[str, float], list[str]]:
    """KL for a unit's h^2 of 1, and what has to be said of those whose measurement does not tell."""
    exact = [name for name, unit in units.items() if unit.squared(base) < _EXACT**2]
    quiet = [name for name, unit in units.items() if name not in exact and unit.kl <= noise]
    found = {name: max(unit.kl, noise) / unit.squared(base) for name, unit in units.items() if name not in exact}
    usual = statistics.median(found.values()) if found else 1.0
    notes = []
    if quiet:
        notes.append(f"mixed: {_some(quiet)} cost no more than rounding noise alone; taken as {noise:g} nats")
    if exact:
        notes.append(f"mixed: {_some(exact)} had no error at {base} bits; taken as sensitive as the median")
    return found | dict.fromkeys(exact, usual), notes


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _measured_at(followed: Record) -> int:
    return int(followed.config["scheme"]["weight"]["bits"])


def _differences(followed: Record, cfg: RunConfig) -> list[str]:
    """What of the followed run's format is another than this one's, beside the width."""
    assert cfg.scheme is not None
    theirs, ours = followed.config["scheme"], asdict(cfg.scheme)
    differ = [key for key in ours["weight"] if key != "bits" and theirs["weight"].get(key) != ours["weight"][key]]
    differ += ["activation"] if (theirs.get("activation") is None) != (ours["activation"] is None) else []
    what = ", ".join(differ)
    return [f"mixed: run {followed.run_id} measured sensitivities under another scheme ({what})"] if differ else []
