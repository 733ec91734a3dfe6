"""Downloads from a hub: they succeed or fail without delay, and an error says in one line what to do instead."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar
from urllib.parse import urlparse

from harness.utils.explain import OneLineError, explain

T = TypeVar("T")
UNREACHABLE = "the hub cannot be reached and no copy is cached"
_PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def reachable() -> bool:
    """Whether the host name of the hub can be resolved, or a proxy is set.

    Without this check the clients of the hub would retry for half a minute.
    """
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def reach(load: Callable[[], T], what: str, remedy: str) -> T:
    """Run `load()`; if the hub cannot be reached, it reads cached files only.

    `what` names the thing that is loaded, `remedy` says what to do if that fails.
    Raises: ValueError with `what`, the reason and `remedy`, in one line.
    """
    offline = not reachable()
    try:
        with _offline() if offline else nullcontext():
            return load()
    except OneLineError:
        raise
    except (OSError, ValueError) as error:  # all errors of the hub's clients: no connection, not found, ...
        reason = UNREACHABLE if offline else _first_line(error)
        raise explain(what, "could not be loaded", reason, remedy) from error


@contextmanager
def _offline() -> Iterator[None]:
    """Switch the clients of the hub to offline mode, so that they do not retry for half a minute."""
    import datasets.config
    from huggingface_hub import constants

    modules: tuple[Any, ...] = (constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
