"""Making durable what has landed, while more is landing: a kill loses what is not in the journal yet."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any, Protocol

from tasks.images.digests import Digests
from tasks.images.extents import merged
from tasks.images.pool import POLL_S, Pool
from tasks.images.writer import Writer
from tasks.models import Extent

WINDOW_BYTES = 64 * 1024 * 1024  # landed and not journaled, at most: what a kill loses, and what memory holds dirty
EVERY_BYTES = WINDOW_BYTES // 2  # so that one half lands while the other is made durable
EVERY_S = 2.0


class Durable(Protocol):
    """Who is told what is durable: a journal."""

    def append(self, extents: Iterable[Extent]) -> None: ...


class Checkpoints:
    """What has landed since the last one, and who has to wait for the next.

    Workers report with `landed`; the thread that waits for them takes the checkpoints. Without a journal there is
    but one, at the end.
    """

    def __init__(
        self,
        writer: Writer,
        digests: Digests,
        journal: Durable | None,
        *,
        pool: Pool[Any],
        every_bytes: int = EVERY_BYTES,
    ) -> None:
        self._writer, self._digests, self._journal, self._pool = writer, digests, journal, pool
        self._every_bytes, self._window_bytes = every_bytes, 2 * every_bytes
        self._landed: list[Extent] = []
        self._landed_bytes = self._not_durable_bytes = 0
        self._last = time.monotonic()
        self._room = threading.Condition()

    def landed(self, extent: Extent) -> None:
        """Take note of an extent that was written, its digests too; wait where a whole window is not durable."""
        if self._journal is None:
            return
        with self._room:
            self._landed.append(extent)
            self._landed_bytes += extent.length
            self._not_durable_bytes += extent.length
            if self._landed_bytes >= self._every_bytes:
                self._pool.wake()
            while self._not_durable_bytes >= self._window_bytes and not self._pool.ended.is_set():
                self._room.wait(POLL_S)

    def take_if_due(self) -> None:
        """Take a checkpoint where enough has landed, or anything a while ago."""
        late = self._landed and time.monotonic() - self._last >= EVERY_S
        if late or self._landed_bytes >= self._every_bytes:
            self.take()

    def take(self) -> None:
        """Make all that has landed durable: the data, then the digests, and then the journal may say so."""
        with self._room:
            landed, self._landed = self._landed, []
            taken_bytes, self._landed_bytes = self._landed_bytes, 0
        self._writer.flush()
        self._digests.flush()
        if self._journal:
            self._journal.append(merged(landed))
        with self._room:
            self._not_durable_bytes -= taken_bytes
            self._room.notify_all()
        self._last = time.monotonic()
