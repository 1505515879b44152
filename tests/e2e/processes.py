"""Finding processes by what stands in their environment, which their children inherit, and ports for them."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path


def marked_processes(prefix: str) -> list[int]:
    """Return the live processes that were started with an environment entry beginning with `prefix`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(entry.startswith(prefix.encode()) for entry in (folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return found


def free_port() -> int:
    """Return a TCP port of loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
