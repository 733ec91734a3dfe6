"""The files of a model in transformers' format: their folder, its config.json, and what transformers reads from it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import ModelConfig
from harness.models import checkpoint, gguf, prequantized
from harness.models.checkpoint import CONFIG, DOWNLOAD, Stored, reading
from harness.utils.errors import Refusal
from harness.utils.explain import explain
from harness.utils.hub import reach

_NO_HUB = "use model=smollm2, which is embedded and needs no hub, or a local folder as model.path=FOLDER"
INCORRECT = "expected a transformers folder, correct config.json"


@dataclass(frozen=True)
class Files:
    """The files of the model that `cfg` names; `key_value` is the key and value that messages begin with.

    Random weights have no files: their `config` is empty, and nothing else may be asked.
    """

    cfg: ModelConfig
    key_value: str

    @functools.cached_property
    def folder(self) -> Path:
        """A local folder, a snapshot of a hub, or the conversion of a GGUF file."""
        if self.cfg.source == "package":
            return gguf.folder(str(self.cfg.package), self.cfg.factor_seed)
        if self.cfg.source == "id":
            return self._snapshot()
        folder = Path(str(self.cfg.path)).expanduser()
        if (folder / CONFIG).is_file():
            return folder
        with reading(self.key_value, INCORRECT):
            prequantized.check_folder({}, folder)
            checkpoint.check_merged(folder)
        detail = "" if folder.is_absolute() else f"the folder is {folder.absolute()}"
        error = explain(self.key_value, f"has no {CONFIG}", detail, "expected a transformers folder")
        raise error if folder.is_dir() else Refusal(str(error))  # a mistyped folder leaves no record

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json; empty for random weights."""
        return {} if self.cfg.source == "architecture" else checkpoint.read_json(self.folder / CONFIG)

    def tensors(self) -> dict[str, Stored]:
        """The tensors in the weight files, by name; those of a hub may lack files that are downloaded later.

        Raises: ValueError if a file is missing or damaged, or the weights are quantized already.
        """
        with reading(self.key_value, DOWNLOAD):
            tensors = checkpoint.tensors(self.folder, partial=self.cfg.source == "id")
            prequantized.check_tensors(tensors)
        return tensors

    def complete(self) -> Path:
        """The folder with all its weight files and the JSON files beside them; those of a hub are downloaded now."""
        if self.cfg.source == "id":
            self._download("*.json", checkpoint.SINGLE[0])
            with reading(self.key_value, DOWNLOAD):
                named = [file.name for file in checkpoint.weight_files(self.folder)]
            self._download(*named or checkpoint.SINGLE)
        return self.folder

    def read(self, auto: Any, remedy: str, **options: Any) -> Any:
        """What the class `auto` of transformers reads; `remedy` is for errors that are not the hub's."""
        quiet()
        options["trust_remote_code"] = False
        if self.cfg.source != "id":
            return auto.from_pretrained(self.folder, **options)

        def load() -> Any:
            with reading(self.key_value, remedy, passing=(OSError,)):  # the hub's errors
                return auto.from_pretrained(self.cfg.id, revision=self.cfg.revision, **options)

        return reach(load, self.key_value, _NO_HUB)

    def _snapshot(self) -> Path:
        """The folder of a hub's cache, with config.json; the other files are added to it when they are needed."""
        from transformers.utils.hub import cached_file

        quiet()
        if Path(str(self.cfg.id)).is_dir():
            raise explain(self.key_value, "is a local folder", "", f"use model.path={self.cfg.id}")
        find = functools.partial(cached_file, str(self.cfg.id), CONFIG, revision=self.cfg.revision)
        return Path(str(reach(find, self.key_value, _NO_HUB))).parent

    def _download(self, *patterns: str) -> None:
        """Add files of the hub to the folder; those in subfolders are copies in other formats."""
        from huggingface_hub import snapshot_download

        options: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": "*/*"}
        load = functools.partial(snapshot_download, str(self.cfg.id), revision=self.cfg.revision, **options)
        reach(load, self.key_value, _NO_HUB)


def quiet() -> None:
    """Turn off progress bars and warnings of transformers; this project shows its own progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
