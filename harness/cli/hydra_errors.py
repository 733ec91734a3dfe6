"""Messages of one line for errors of Hydra, in the style of this project."""

from __future__ import annotations

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from harness.utils import errors

_EXTRA = "joblib, submitit, ray and optuna come with: pip install 'ptqbench[sweeps]'"


def one_line(error: BaseException) -> str:
    """The message of an error that Hydra, a configuration or a run raised, in one line."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        axis, _, value = error.missing_cfg_file.rpartition("/")
        hint = _EXTRA if axis in ("hydra/launcher", "hydra/sweeper") else "--config-dir=FOLDER adds your own"
        return f"{axis}={value} is unknown; {errors.choices(value, error.options)} ({hint})"
    message = " ".join(str(error).split())
    if isinstance(error, HydraException) and isinstance(error.__cause__, ConfigAttributeError | ConfigKeyError):
        return _unknown_key(message, error.__cause__)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return message
    return errors.one_line(error)


def _unknown_key(message: str, cause: ConfigAttributeError | ConfigKeyError) -> str:
    """The message for an unknown key, with the keys that exist next to it.

    Hydra's message is "Could not override 'KEY'. To append to your config use +KEY=VALUE"; its cause has the keys.
    """
    argument = message.rpartition("use +")[2] or cause.full_key
    siblings = list(map(str, cause.parent_node or ()))
    return f"{argument} is an unknown key; {errors.choices(str(cause.key), siblings)}"
