"""Which source of weights a run uses if the section `model` has several, and the name that is shown for the model.

The command line adds a source to those of the axis `model`: `model.path=FOLDER` and `model.id=NAME` replace the package
of the default model, and with it the default model's name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

SOURCES = ("path", "id", "package", "architecture")  # in this order the first is used, if the command line has none


def one_source(model: Mapping[str, Any], typed: Collection[str] = ()) -> dict[str, Any]:
    """The section `model` with the source that a run uses, without the other sources, and with the name for it.

    typed  keys of the section that are on the command line; one that is a source is used

    Raises: ValueError if the command line has two sources, or a name for a folder.
    """
    sources = [key for key in SOURCES if model.get(key) is not None]
    chosen = [key for key in sources if key in typed]
    if len(chosen) > 1:
        first, second = (f"model.{key}={model[key]}" for key in chosen[:2])
        raise ValueError(f"{first} and {second} are two sources of weights; expected one of them")
    if not sources:
        return dict(model)
    source = (chosen or sources)[0]
    if source == "path" and "name" in typed:
        raise ValueError(
            f"model.name={model['name']} has no effect with model.path={model['path']}: the folder's name is shown; "
            "remove it, or rename the folder"
        )
    others = [key for key in sources if key != source]
    unused = [*others, *(["factor_seed"] if source != "package" and "factor_seed" in model else [])]
    named = {**model, **dict.fromkeys(unused)}
    if source == "path" or ("name" not in typed and (others or source in typed)):
        named["name"] = _name(source, model[source]) or model.get("name")
    return named


def folder_name(path: str) -> str:
    """The name that is shown for the model in a folder: the folder's name, or the model's in a cache of the hub."""
    folder = Path(path).expanduser().resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name or path


def _name(source: str, value: Any) -> str | None:
    """The name for the value of a source; None for an architecture, which has only the configured name."""
    if source == "path":
        return folder_name(str(value))
    if source == "architecture":
        return None
    return str(value).partition("==")[0]
