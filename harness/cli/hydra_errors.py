"""Messages of one line for errors of Hydra, in the style of this project."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from harness.cli.main import conf_folder
from harness.utils import errors
from harness.utils.errors import keys_of, short

_EXTRA = "more come with pip install 'ptqbench[sweeps]'"
# Messages of Hydra that say what was typed, and what to say instead.
_MESSAGES = (
    (r"Ambiguous value for argument '(?P<key>[^=]+)=(?P<value>.*?)' 1\.",
     "{key}={value} has several values: add -m to run each of them, or write '{key}=[{value}]' for a list"),
    (r"Sweep parameters '(?P<text>.*)' requires --multirun", "{text} has several values: add -m to run each of them"),
    (r"Could not append to config\. An item is already at '(?P<key>[^']+)'",
     "+{key} exists already; expected {key}=VALUE, without +"),
    (r"Could not delete from config\. '(?P<key>[^']+)' does not exist",
     "~{key} is an unknown key; expected ~KEY of a key that exists (--help lists all)"),
    (r"Could not delete from config\. The value of '(?P<key>[^']+)' is (?P<value>.*) and not",
     "~{key} has another value, {value}; expected ~{key} alone"),
    (r"Could not (?:override|delete) '(?P<key>[^']+)'\. No match in the defaults list",
     "{key} is an unknown axis; expected one of those that --help lists"),
    (r"Could not override '(?P<key>[^']+)'\. Did you mean to override (?P<text>[^\s?]+)\?",
     "{key} is an unknown axis; did you mean {text}?"),
    (r"Could not append '(?P<text>[^']+)'", "{text} is set already; expected it without +"),
    (r"Multiple values for (?P<key>[\w./@]+)\.", "{key} is set twice; expected {key}=VALUE once"),
    (r"(?P<key>[\w./@]+) appears more than once in the final defaults list", "{key} is set twice; expected it once"),
    (r"Override (?P<text>\S+) looks like a config group override", "{text} is unknown; expected an axis without @"),
    (r"Cannot find primary config '(?P<text>[^']+)'",
     "--config-name={text} is no file of the configuration; leave the flag out, or add --config-dir=FOLDER"),
    (r"Additional config directory '(?P<text>[^']+)' not found",
     "--config-dir={text} is no folder; expected one with files such as method/NAME.yaml"),
    (r"Sweeping over Hydra's configuration is not supported : '(?P<text>.*)'",
     "{text} has several values; expected one: keys of hydra cannot be swept"),
    (r"(?:Only one of --run, --multirun)", "expected one of the flags --run, --multirun, --cfg, --info and -sc"),
    (r"The --resolve flag can only", "--resolve means nothing alone; expected it with --cfg or --help"),
    (r"Interpolation key '(?P<text>[^']+)' not found", "${{{text}}} is no key of the configuration (--help lists all)"),
    (r"Error locating target '(?P<text>[^']+)'", "_target_={text} cannot be imported; expected module.Class"),
)  # fmt: skip
# Messages of OmegaConf and of Python about a key in a list; the word in quotes is the part of the key that is no index.
_INDEX = re.compile(r"(?:invalid literal for int\(\) with base 10:|\bIndex) '(?P<word>[^']+)'|list index out of range")


def one_line(error: BaseException, arguments: tuple[str, ...] = ()) -> str:
    """The message of an error that Hydra, a configuration or a run raised, in one line.

    `arguments` are those of the command line: some of Hydra's messages do not say which of them is wrong.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        axis, _, value = error.missing_cfg_file.rpartition("/")
        hint = _EXTRA if axis in ("hydra/launcher", "hydra/sweeper") else "--config-dir=FOLDER adds your own"
        return f"{axis}={value} is unknown; {errors.choices(value, error.options)} ({hint})"
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    message = " ".join(str(error).split())
    if isinstance(error, ConfigCompositionException) and isinstance(
        error.__cause__, ConfigAttributeError | ConfigKeyError
    ):
        return _unknown_key(message, error.__cause__)
    if "Config group override" in message or "must be a string or a list" in message:
        return _no_name(arguments)
    if inside := _inside_a_list(f"{message} {error.__cause__}", arguments):
        return inside
    for pattern, words in _MESSAGES:
        if found := re.search(pattern, message):
            return words.format(**{name: short(text) for name, text in found.groupdict().items()})
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _without_hydra(message, error)
    return errors.one_line(error)


def quoted(key: str, value: str) -> str:
    """KEY=VALUE as it is typed in a shell if the value has signs that Hydra's grammar reserves."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    argument = f"{key}='{escaped}'"
    return f'"{argument}"' if not set(argument) & set('"$`\\!') else shlex.quote(argument)


def _unreadable(argument: str) -> str:
    """The message for an argument that Hydra's grammar cannot read: how to quote its value."""
    key, equals, value = argument.partition("=")
    if not equals:
        return f"{short(argument)} is not KEY=VALUE (see --help)"
    if not re.fullmatch(r"[+~]{0,2}[\w.@/-]+", key, re.ASCII):
        return f"{short(argument)}: {short(key)} is no key; expected KEY=VALUE, as bits=3"
    value = value.strip().strip("'\"") if value.count("'") != 1 and value.count('"') != 1 else value
    if value.startswith("~/"):  # the shell replaces it only in front of a word
        return f'{key}={short(value)}: a quoted ~ is no folder; expected {key}="$HOME/{short(value[2:])}"'
    return f"{key}={short(value)} has signs that must be quoted; expected {quoted(key, short(value))}"


def _no_name(arguments: tuple[str, ...]) -> str:
    """The message for an axis whose value is not a name, such as method=null."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        folder = conf_folder() / key
        if (folder.is_dir() and not re.fullmatch(r"[\w,./'\"\[\]-]+", value)) or value in ("null", "true", "false", ""):
            names = sorted(path.stem for path in folder.glob("*.yaml"))
            return f"{short(argument)} is no name; {errors.choices(value, names)}"
    return "an axis has a value that is no name; expected AXIS=NAME (--help lists the names)"


def _inside_a_list(message: str, arguments: tuple[str, ...]) -> str | None:
    """The message for a list that is written like a mapping, such as skip.a=3; None if `message` is not about one."""
    found = _INDEX.search(message)
    word = re.escape(found["word"]) if found and found["word"] else r"\d+"
    for argument in arguments if found else ():
        if key := re.match(rf"[+~]*(?P<list>[^=]+?)\.{word}(?=[.=]|$)", argument):
            name, value = key["list"], argument.partition("=")[2].strip("[]")
            return f"{short(argument)}: {name} is a list, set as a whole; expected '{name}=[{short(value) or 'VALUE'}]'"
    return None


def _unknown_key(message: str, cause: ConfigAttributeError | ConfigKeyError) -> str:
    """The message for an unknown key, with the most similar keys of the whole configuration.

    Hydra's message is "Could not override 'KEY'. To append to your config use +KEY=VALUE"; its cause has the keys.
    """
    argument = message.rpartition("use +")[2] or str(cause.full_key)
    if (conf_folder() / argument.partition("=")[0]).is_dir():  # an axis, whose value is a mapping
        return _no_name((argument,))
    node = cause.parent_node
    root = node._get_root() if node is not None else None
    keys = keys_of(_plain(root)) if isinstance(root, DictConfig) else []
    similar = errors.similar_keys(argument.partition("=")[0], keys)
    others = [] if similar else _keys_of_methods(argument.partition("=")[0])
    if others:
        guesses = " or ".join(f"{key} (with method={method})" for key, method in others[:2])
        return f"{short(argument, 40)} is an unknown key; did you mean {guesses}?"
    return str(errors.UnknownKey(argument, keys))


def _keys_of_methods(key: str) -> list[tuple[str, str]]:
    """The keys of all methods that the mistyped `key` can mean, each with the method that has it."""
    owners: dict[str, str] = {}
    for path in sorted((conf_folder() / "method").glob("*.yaml")):
        steps = yaml.safe_load(path.read_text()) or {}
        steps = steps.get("method", steps) if isinstance(steps, Mapping) else {}
        for name in keys_of({step: values for step, values in steps.items() if step != "defaults"}, "method."):
            owners.setdefault(name, path.stem)
    return [(name, owners[name]) for name in errors.similar_keys(key, [n for n in owners if n.count(".") > 1])]


def _plain(cfg: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(cfg, resolve=False)
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _without_hydra(message: str, error: BaseException) -> str:
    """Any other message, with its cause, without addresses and names of Hydra's classes."""
    cause = " ".join(str(error.__cause__).split()) if error.__cause__ is not None else ""
    text = re.sub(r"See https://\S+( for details)?|full_key: \S*|object_type=\S*", "", f"{message} {cause}")
    text = re.sub(r"^Error merging override (\S+)", r"\1 cannot be set:", text)
    return short(" ".join(text.split()), errors.LIMIT)
