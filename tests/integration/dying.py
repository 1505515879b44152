"""Runs the command line in a process that kills itself (SIGKILL) at a named point: `dying.py POINT command-line…`.

A point is `module:name:before|after[:n]`: that function, called for the n-th time (1 where not said). What is
around it is the real thing; nothing is replaced but the moment of death added.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any


def arm(point: str) -> None:
    """Have the process die at `point`."""
    module_name, path, when, *times = point.split(":")
    owner: Any = importlib.import_module(module_name)
    *holders, name = path.split(".")
    for holder in holders:
        owner = getattr(owner, holder)
    original, calls, last = getattr(owner, name), count(1), int(times[0]) if times else 1

    def deadly(*args: Any, **kwargs: Any) -> Any:
        number = next(calls)  # several threads may call
        if number == last and when == "before":
            die()
        result = original(*args, **kwargs)
        if number == last:
            die()
        return result

    setattr(owner, name, deadly)


def die() -> None:
    """Print who must die too: process ids, with command lines, as a line of JSON."""
    print(json.dumps(dict(descendants(os.getpid()))), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def descendants(pid: int) -> Iterator[tuple[int, str]]:
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            for child in map(int, thread.read_text().split()):
                yield child, Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
                yield from descendants(child)


if __name__ == "__main__":
    arm(sys.argv[1])
    from hyper2kvm.cli import main

    sys.exit(main(sys.argv[2:]))
