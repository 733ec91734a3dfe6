"""Errors as one line each: what a person typed, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

_EXTRA = "joblib, submitit, ray and optuna come with: pip install 'ptqbench[sweeps]'"


def one_line(error: BaseException) -> str:
    """The message of an error in one line; a bug keeps its class name, and its traceback is one setting away."""
    message = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        axis, _, value = error.missing_cfg_file.rpartition("/")
        more = _EXTRA if axis in ("hydra/launcher", "hydra/sweeper") else "--config-dir=FOLDER adds your own"
        return f"{axis}={value} is unknown; {choices(value, error.options)} ({more})"
    if isinstance(error, HydraException) and isinstance(error.__cause__, ConfigAttributeError | ConfigKeyError):
        return _unknown_key(message, error.__cause__)
    if isinstance(error, ValueError | HydraException | OmegaConfBaseException):
        return message
    return f"{type(error).__name__}: {message}; HYDRA_FULL_ERROR=1 shows where"


def choices(word: str, names: Sequence[str]) -> str:
    """What `word` may have meant, and all that it could have been."""
    close = difflib.get_close_matches(word, names, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}expected one of: {', '.join(names) or 'no keys at all'}"


def _unknown_key(message: str, cause: ConfigAttributeError | ConfigKeyError) -> str:
    """Hydra says "Could not override 'KEY'. To append to your config use +KEY=VALUE"; the cause knows the others."""
    typed = message.rpartition("use +")[2] or cause.full_key
    siblings = list(map(str, cause.parent_node or ()))
    return f"{typed} is an unknown key; {choices(str(cause.key), siblings)}"
