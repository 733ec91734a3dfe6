"""The results of a race as Markdown."""

from __future__ import annotations

from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """A table of tokens per second, with speedups in brackets, and the models that are left out."""
    lines = [
        f"`{results['command']}` ({results['name']}): tokens per second (speedup over {results['baseline']}), prompt "
        f"of {results['prompt']} tokens, {results['steps']} decode steps, {results['threads']} threads, medians of "
        f"{results['rounds']} interleaved rounds; MiB of weights; error: relative, of the prompt's last logits.",
        "",
        "| model | MiB | error | prefill | decode |",
        "|:---|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        cells = (f"{row[key]:.4g} ({row[f'{key}_speedup']:.2f}x)" for key in ("prefill", "decode"))
        lines.append(f"| {row['model']} | {row['mib']:.0f} | {row['logits_error']:.1e} | " + " | ".join(cells) + " |")
    if results["absent"]:
        lines += ["", "Not timed:", "", *(f"- {name}: {reason}" for name, reason in results["absent"].items())]
    return "\n".join(lines) + "\n"
