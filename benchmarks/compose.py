"""The configuration of a run, as the command line resolves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from harness.config import RunConfig, build_run

_CONF = Path(__file__).parents[1] / "conf"


def resolved(*overrides: str) -> dict[str, Any]:
    """The resolved configuration of `python -m harness` with these overrides."""
    with initialize_config_dir(version_base="1.3", config_dir=str(_CONF)):
        container: Any = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    return dict(container)


def configuration(*overrides: str) -> RunConfig:
    """Likewise as the object that a run reads.

    Raises: ValueError if it is incorrect.
    """
    return build_run(resolved(*overrides))
