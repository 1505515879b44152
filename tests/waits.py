"""Waiting for what comes in its own time."""

from __future__ import annotations

import time
from collections.abc import Callable

LOOK_EVERY_S = 0.1


def await_that(holds: Callable[[], bool], timeout_s: float = 30, otherwise: Callable[[], str] = str) -> None:
    """Return once it holds; fail after `timeout_s`, in the words of `otherwise`."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(LOOK_EVERY_S)
