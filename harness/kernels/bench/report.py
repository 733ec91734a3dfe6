"""The record of a kernel benchmark as Markdown."""

from __future__ import annotations

from typing import Any

from harness.kernels.bench.targets import cpu_targets

# Target speedups over cuBLAS bf16 on a GPU with group size 128, by M.
TARGETS = {
    "int4 g128": {1: 2.6, 16: 2.5, 64: 1.8, 256: 0.85, 4096: 0.92},
    "w8a8": {1: 1.6, 256: 1.4, 4096: 1.6},
}


def markdown(record: dict[str, Any]) -> str:
    """Heading, environment, one table per shape, targets on a GPU, and the kernels that were not timed and why."""
    lines = [*_heading(record)]
    shapes = dict.fromkeys((row["model"], row["layer"], row["N"], row["K"]) for row in record["rows"])
    for model, layer, N, K in shapes:
        rows = [row for row in record["rows"] if (row["model"], row["layer"]) == (model, layer)]
        lines += ["", f"### {model} {layer}: N = {N}, K = {K}", "", *_table(rows)]
    if record["environment"]["threads"] is not None:
        lines += ["", "### Targets", "", *cpu_targets(record["rows"], record["group_size"])]
    elif record["environment"]["cuda"]:
        lines += ["", "### Targets", "", *_targets(record["rows"])]
    if record["absent"]:
        lines += ["", "### Not timed", "", *(f"- {name}: {reason}" for name, reason in record["absent"].items())]
    return "\n".join(lines) + "\n"


def _heading(record: dict[str, Any]) -> list[str]:
    details = {key: value for key, value in record["environment"].items() if value is not None and key != "device"}
    bandwidth, rate = (record["roofline"][key] for key in ("bandwidth", "rate"))
    return [
        f"## Kernels on {record['environment']['device']}",
        "",
        f"`{record['command'].strip()}`, {record['dtype']}, int4 in groups of {record['group_size']}; "
        + ", ".join(f"{key} {value}" for key, value in details.items()),
        "",
        f"Roofline, measured before each shape; the best: copy {bandwidth / 1e9:.4g} GB/s, bf16 matmul "
        f"{rate / 1e12:.4g} TFLOP/s. Each cell: median microseconds with "
        f"cold weights (speedup over {record['baseline']}, share of the roofline).",
    ]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    sizes = sorted({row["M"] for row in rows})
    lines = ["| kernel | " + " | ".join(f"M = {M}" for M in sizes) + " |", "|:---|" + "---:|" * len(sizes)]
    for name in dict.fromkeys(row["kernel"] for row in rows):
        by_size = {row["M"]: row for row in rows if row["kernel"] == name}
        lines.append(f"| {name} | " + " | ".join(_cell(by_size.get(M)) for M in sizes) + " |")
    return lines


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{row['us_p50']:.4g} ({row['ratio']:.2f}x, {100 * row['share']:.0f}%)"


def _targets(rows: list[dict[str, Any]]) -> list[str]:
    """A table of the targets, each with the lowest speedup over all shapes."""
    lines = ["| kernel | M | target | lowest speedup | N x K | result |", "|:---|---:|---:|---:|:---|:---|"]
    for name, targets in TARGETS.items():
        for M, target in targets.items():
            matching = [row for row in rows if row["kernel"] == name and row["M"] == M]
            if matching:
                worst = min(matching, key=lambda row: float(row["ratio"]))
                result = "met" if worst["ratio"] >= target else f"missed, {100 * worst['share']:.0f}% of the roofline"
                shape = f"{worst['N']} x {worst['K']}"
                lines.append(f"| {name} | {M} | {target}x | {worst['ratio']:.2f}x | {shape} | {result} |")
    return lines
