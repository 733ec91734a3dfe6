"""Reaching a hub: at once or not at all, with one line that says what to do instead."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar
from urllib.parse import urlparse

T = TypeVar("T")
UNREACHABLE = "the hub cannot be reached and no copy is cached"
_PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def reachable() -> bool:
    """Whether the hub's name resolves, or a proxy stands in between; clients would retry for half a minute."""
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def reach(load: Callable[[], T], what: str, remedy: str) -> T:
    """Run `load()`, from what is cached alone where the hub is out of reach.

    Raises: ValueError with `what` and `remedy` in one line if it fails.
    """
    offline = not reachable()
    try:
        with _offline() if offline else nullcontext():
            return load()
    except (OSError, ValueError) as error:  # what the hub's clients raise, connection and not-found errors included
        reason = UNREACHABLE if offline else _first_line(error)
        raise ValueError(f"{what} could not be loaded ({reason}); {remedy}") from error


@contextmanager
def _offline() -> Iterator[None]:
    """Keep the hub's clients from trying, and trying again, for half a minute."""
    import datasets.config
    from huggingface_hub import constants

    switches: tuple[Any, ...] = (constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in switches]
    for module in switches:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
