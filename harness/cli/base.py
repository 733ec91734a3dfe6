"""The float model of a quantized checkpoint, as the command line names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from harness.cli.main import conf_folder
from harness.config import folder_name


def find_base(raw: dict[str, Any]) -> None:
    """Change `model.base` of `raw` from a name of the axis `model`, a folder or an id of the hub to a section.

    Raises: ValueError if it is none of these.
    """
    model = raw.get("model")
    base = model.get("base") if isinstance(model, dict) else None
    if not isinstance(base, str):
        return
    named = conf_folder() / "model" / f"{base}.yaml"
    if "/" not in base and named.is_file():
        section = OmegaConf.to_container(OmegaConf.load(named))
        raw["model"]["base"] = section.get("model", section) if isinstance(section, dict) else section
    elif Path(base).expanduser().exists():
        raw["model"]["base"] = {"name": folder_name(base), "path": base}
    elif base.count("/") == 1:
        raw["model"]["base"] = {"name": base, "id": base, "revision": "main"}
    else:
        raise ValueError(
            f"model.base={base} is unknown; expected a folder, a name of conf/model, or OWNER/NAME of a hub"
        )
