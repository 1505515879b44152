"""Whether other machines can be reached from here: names resolved, ports open. Nothing is said to them."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor

from pydantic import Field

from tasks.models import Value

PATIENCE_S = 3.0
AT_ONCE = 32


class Server(Value):
    """A port of a machine that something is to be read from."""

    host: str
    port: int


class Reached(Value):
    """How a host answers. unresolved: why its name is none here, "" if it is one. shut: why, by port not open."""

    host: str
    unresolved: str = ""
    shut: dict[int, str] = Field(default_factory=dict)


def reach_all(wanted: Mapping[str, Set[int]], *, patience_s: float = PATIENCE_S) -> dict[str, Reached]:
    """Return how each host answers on its ports, side by side."""
    with ThreadPoolExecutor(max_workers=AT_ONCE, thread_name_prefix="reach") as pool:
        found = pool.map(lambda name: reach(name, sorted(wanted[name]), patience_s=patience_s), wanted)
        return dict(zip(wanted, found, strict=True))


def reach(host: str, ports: Iterable[int], *, patience_s: float = PATIENCE_S) -> Reached:
    """Return how one host answers."""
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        return Reached(host=host, unresolved=error.strerror or str(error))
    shut = {port: why for port in ports if (why := _shut(host, port, patience_s))}
    return Reached(host=host, shut=shut)


def _shut(host: str, port: int, patience_s: float) -> str:
    try:
        with socket.create_connection((host, port), patience_s):
            return ""
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
