"""How fast the bytes of a run may come: one rate, shared by every thread of every disk. It does not wait by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Paced(Protocol):
    """What says how long to wait after bytes came."""

    def delay(self, count: int) -> float:
        """Count `count` bytes that came; return the seconds after which more may. Called by any thread."""
        ...


class Rate:
    """A limit of bytes a second, kept on average (a leaky bucket: ITU-T I.371, virtual scheduling).

    time.sleep(rate.delay(len(buffer)))
    """

    def __init__(self, bytes_per_s: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_per_s, self._clock = bytes_per_s, clock
        self._free_at = clock()
        self._lock = threading.Lock()

    def delay(self, count: int) -> float:
        """Count `count` bytes that came; return the seconds after which more may. Called by any thread."""
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now) + count / self._bytes_per_s
            return self._free_at - now


RATE: ContextVar[Rate | None] = ContextVar("RATE", default=None)
"""The rate of the run that the code belongs to; None is as fast as it goes."""


@contextmanager
def limited_to(bytes_per_s: int | None) -> Iterator[None]:
    """Have everything that the block starts keep to one rate together."""
    token = RATE.set(Rate(bytes_per_s) if bytes_per_s else None)
    try:
        yield
    finally:
        RATE.reset(token)
