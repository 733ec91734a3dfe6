"""Hydra's errors as one line each, in the words of this project."""

from __future__ import annotations

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from harness.utils import errors

_EXTRA = "joblib, submitit, ray and optuna come with: pip install 'ptqbench[sweeps]'"


def one_line(error: BaseException) -> str:
    """The message of an error of a command line in one line."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        axis, _, value = error.missing_cfg_file.rpartition("/")
        more = _EXTRA if axis in ("hydra/launcher", "hydra/sweeper") else "--config-dir=FOLDER adds your own"
        return f"{axis}={value} is unknown; {errors.choices(value, error.options)} ({more})"
    message = " ".join(str(error).split())
    if isinstance(error, HydraException) and isinstance(error.__cause__, ConfigAttributeError | ConfigKeyError):
        return _unknown_key(message, error.__cause__)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return message
    return errors.one_line(error)


def _unknown_key(message: str, cause: ConfigAttributeError | ConfigKeyError) -> str:
    """Hydra says "Could not override 'KEY'. To append to your config use +KEY=VALUE"; the cause has the others."""
    typed = message.rpartition("use +")[2] or cause.full_key
    siblings = list(map(str, cause.parent_node or ()))
    return f"{typed} is an unknown key; {errors.choices(str(cause.key), siblings)}"
