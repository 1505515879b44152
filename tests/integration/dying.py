"""Runs the command line in a process that kills itself (SIGKILL) at a named point: `dying.py POINT command-line…`.

A point is `module:name:before|after[:n]`: that function, called for the n-th time (1 where not said). What is
around it is the real thing; nothing is replaced but the moment of death added.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from itertools import count
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
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if number == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


if __name__ == "__main__":
    arm(sys.argv[1])
    from hyper2kvm.cli import main

    sys.exit(main(sys.argv[2:]))
