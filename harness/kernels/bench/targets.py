"""The targets of kernels on a CPU, from the rows of a kernel benchmark.

For each model: the share of the copy bandwidth that int4 reaches with one row of x; the times of 3 and 2 bits as parts
of that of 4 bits; and how many times as fast int4 is as each peer. Each figure is that of the worst shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.kernels.bench.peers import PEERS

LEAST_SHARE = 0.70
MOST_TIME = {3: 0.85, 2: 0.65}

Rows = Sequence[dict[str, Any]]


def cpu_targets(rows: Rows, group_size: int) -> list[str]:
    """Markdown: a table of shares and times, and one of speedups over peers."""
    return [*_memory(rows, group_size), "", *_peers(rows, group_size)]


def _memory(rows: Rows, group_size: int) -> list[str]:
    lines = ["| model | M = 1 | target | worst shape | N x K | result |", "|:---|:---|---:|---:|:---|:---|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {bits: _by_shape(rows, model, f"int{bits} g{group_size}", 1) for bits in (4, 3, 2)}
        if not own[4]:
            continue
        share, shape = min((row["share"], shape) for shape, row in own[4].items())
        result = _verdict(share >= LEAST_SHARE)
        lines.append(
            f"| {model} | int4: share of copy bandwidth | {LEAST_SHARE:.0%} | {share:.0%} | {shape} | {result} |"
        )
        for bits, most in MOST_TIME.items():
            if times := [(own[4][shape]["ratio"] / row["ratio"], shape) for shape, row in own[bits].items()]:
                time, shape = max(times)
                verdict = _verdict(time <= most)
                lines.append(f"| {model} | int{bits}: time / int4's | {most} | {time:.2f} | {shape} | {verdict} |")
    return lines


def _peers(rows: Rows, group_size: int) -> list[str]:
    sizes = sorted({row["M"] for row in rows})
    lines = [
        "| model | int4, times as fast as | " + " | ".join(f"M = {M}" for M in sizes) + " |",
        "|:---|:---|" + "---:|" * len(sizes),
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        for peer in PEERS:
            cells = [_least(rows, model, peer.name, M, group_size) for M in sizes]
            if set(cells) != {"-"}:
                lines.append(f"| {model} | {peer.name} | " + " | ".join(cells) + " |")
    return lines


def _least(rows: Rows, model: str, peer: str, M: int, group_size: int) -> str:
    own, other = (_by_shape(rows, model, name, M) for name in (f"int4 g{group_size}", peer))
    speedups = [own[shape]["ratio"] / row["ratio"] for shape, row in other.items() if shape in own]
    return f"{min(speedups):.2f}x" if speedups else "-"


def _by_shape(rows: Rows, model: str, kernel: str, M: int) -> dict[str, dict[str, Any]]:
    return {
        f"{row['N']} x {row['K']}": row for row in rows if (row["model"], row["kernel"], row["M"]) == (model, kernel, M)
    }


def _verdict(met: bool) -> str:
    return "met" if met else "missed"
