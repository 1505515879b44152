"""How much may lie there that no journal covers: counted, whatever the disk does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.images import checkpoints
from tasks.images.copy import Limits, copy
from tasks.images.digests import LEAF_BYTES, Buffer, Digests
from tasks.images.extents import whole_disk
from tasks.images.journal import Journal
from tasks.process import Stopped
from tests.unit.images.fakes import FakeReader, FakeWriter, leaves

THREADS = 3
WINDOW = 8 * LEAF_BYTES
CONTENT = leaves("abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz")
LIMITS = Limits(threads=THREADS, checkpoint_bytes=WINDOW // 2)


class SlowlyDurable(FakeWriter):
    """A flush returns only when the window is full, or nothing is left to come; half a window waits for one to begin.

    So it depends on no clock what lands while the disk is at it.
    """

    journal: Journal
    most = overlapping = 0
    flushing = False

    def outstanding(self) -> int:
        return sum(length for _, length in self.written) - sum(extent.length for extent in self.journal.covered)

    def write(self, offset: int, buffer: Buffer) -> None:
        until(lambda: self.flushing or self.outstanding() < WINDOW // 2)
        super().write(offset, buffer)
        self.most = max(self.most, self.outstanding())

    def flush(self) -> None:
        super().flush()
        before, self.flushing = len(self.written), True
        until(lambda: self.outstanding() >= WINDOW or len(self.written) * LEAF_BYTES == len(CONTENT))
        self.overlapping += len(self.written) - before
        self.flushing = False


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_while_the_disk_is_slow_no_more_than_a_window_lands(tmp_path: Path) -> None:
    writer = SlowlyDurable(len(CONTENT))
    reader = FakeReader(CONTENT, depth=THREADS, preferred=3 * LEAF_BYTES)
    with (
        Digests.create(tmp_path / "x.digests", size=len(CONTENT)) as digests,
        Journal.open(tmp_path / "x.journal", binding={}) as journal,
    ):
        writer.journal = journal
        copy(
            reader,
            whole_disk(reader.size),
            writer,
            digests=digests,
            limits=LIMITS,
            journal=journal,
        )
    assert WINDOW <= writer.most <= WINDOW + THREADS * LEAF_BYTES
    assert writer.overlapping  # it went on landing while the disk was at it
    assert writer.content == CONTENT


def test_what_trickles_in_is_durable_before_the_window_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "EVERY_S", 0.0)
    content = leaves("abc")
    reader = FakeReader(content, depth=1, stalls_at=2 * LEAF_BYTES)
    writer, stop = FakeWriter(len(content)), threading.Event()
    with (
        Digests.create(tmp_path / "x.digests", size=len(content)) as digests,
        Journal.open(tmp_path / "x.journal", binding={}) as journal,
    ):

        def end_it_once_covered() -> None:
            until(lambda: sum(extent.length for extent in journal.covered) == 2 * LEAF_BYTES)
            stop.set()

        watching = threading.Thread(target=end_it_once_covered)
        watching.start()
        with pytest.raises(Stopped):
            copy(reader, whole_disk(reader.size), writer, digests=digests, limits=LIMITS, journal=journal, stop=stop)
        watching.join()
        assert sum(extent.length for extent in journal.covered) == 2 * LEAF_BYTES


def test_a_flush_that_fails_midway_ends_it_with_its_own_error(tmp_path: Path) -> None:
    """Workers that wait for room are not left waiting, and nothing is journaled."""
    writer = FakeWriter(len(CONTENT), fails={"flush": OSError("flush is broken")})
    with (
        Digests.create(tmp_path / "x.digests", size=len(CONTENT)) as digests,
        Journal.open(tmp_path / "x.journal", binding={}) as journal,
        pytest.raises(OSError, match="flush is broken"),
    ):
        reader = FakeReader(CONTENT, depth=4)
        copy(reader, whole_disk(len(CONTENT)), writer, digests=digests, limits=LIMITS, journal=journal)
    assert journal.covered == ()
    assert len(writer.written) * LEAF_BYTES <= WINDOW + 4 * LEAF_BYTES
