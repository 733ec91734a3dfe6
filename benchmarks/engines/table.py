"""The results of all engines as Markdown."""

from __future__ import annotations

from typing import Any

from harness.reports.markdown import table


def markdown(results: dict[str, Any]) -> str:
    """A table of relative errors, and the reasons of what did not load."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    lines = [
        f"`{results['command']}` ({results['model']}): relative error of the logits of {results['prompt']} tokens "
        f"between an engine and this project's reader of the same exported folder, both in float32. {versions}.",
        "",
    ]
    errors = [f"{row['error']:.1e}" if "error" in row else "-" for row in results["rows"]]
    cells = [
        [row["export"], row["settings"], row["engine"], error]
        for row, error in zip(results["rows"], errors, strict=True)
    ]
    lines.append(table(("export", "settings", "engine", "error"), cells, numbers=("error",), pad=False))
    reasons: dict[str, list[str]] = {}
    for row in results["rows"]:
        if "reason" in row:
            reasons.setdefault(f"{row['engine']}: {row['reason']}", []).append(row["settings"])
    if reasons:
        lines += ["", "Not loaded:", "", *(f"- {reason} ({'; '.join(names)})" for reason, names in reasons.items())]
    return "\n".join(lines) + "\n"
