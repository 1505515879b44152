"""The copy loop: extents of a reader into a writer, leaf by leaf, with digests. Every mode that moves a disk is this.

It neither opens nor closes what it is given, and plans nothing: which extents, is the mode's business.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import groupby
from typing import Protocol, runtime_checkable

from pydantic import Field
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    wait_random_exponential,
)

from tasks.errors import IntegrityMismatch, TransferInterrupted
from tasks.images.checkpoints import EVERY_BYTES, Checkpoints, Durable
from tasks.images.digests import LEAF_BYTES, ZERO_RECORD, Buffer, Digests, is_zero, leaf_count
from tasks.images.extents import check_plan, pieces
from tasks.images.leaves import Misread, Piece
from tasks.images.pool import Pool
from tasks.images.writer import Writer
from tasks.models import Extent, Value
from tasks.rate import Paced
from tasks.reader import Buffer as Streamed
from tasks.reader import Hole, Reader, Scattered, TransientFault, runs_within

CLUSTER_BYTES = 64 * 1024  # of a qcow2, where nothing else is said: what a target has or has not

_log = logging.getLogger(__name__)


class Limits(Value):
    """How hard to pull, and how long to believe in a source that fails: a minute, if it fails at once each time.

    attempts: since the last progress. The waits between them double from the first to the longest, each random
    between nothing and that (full jitter), so that many copies do not come back at once. checkpoint_bytes: landed, and
    it is made durable.
    """

    threads: int = Field(default=4, ge=1)
    attempts: int = Field(default=10, ge=1)
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0
    checkpoint_bytes: int = EVERY_BYTES


@runtime_checkable
class InBatches(Scattered, Protocol):
    """A reader that is better asked for several extents than for one: a thread takes up to `batch` of them at once."""

    batch: int


class CopyResult(Value):
    """What a copy did.

    bytes_transferred: what came from the source, counted again where it was asked for again. bytes_written: of it,
    what was not zero. digest: of the whole image.
    """

    bytes_transferred: int
    bytes_written: int
    seconds: float
    digest: str


def copy(
    reader: Reader,
    extents: Iterable[Extent],
    writer: Writer,
    *,
    digests: Digests,
    limits: Limits | None = None,
    progress: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
    journal: Durable | None = None,
    rate: Paced | None = None,
) -> CopyResult:
    """Copy `extents` (whole leaves, sorted) from an entered `reader` to `writer`; return when they are durable.

    progress: called with the bytes done since the last call, by several threads.
    stop: when set, Stopped is raised within a second. journal: told what is durable, window by window, so that a kill
    at any point loses no more than one (`tasks.images.checkpoints`). rate: how fast, with all others that share it.
    Raises the first error that came up in any thread; TransferInterrupted where the source kept failing,
    IntegrityMismatch where it did not give what was asked for.
    """
    started = time.monotonic()
    planned = tuple(extents)
    check_plan(planned, size=digests.size)
    run = _Copy(reader, writer, digests, limits or Limits(), progress, stop, journal, rate)
    run.fetch_all(planned)
    return CopyResult(
        bytes_transferred=run.received,
        bytes_written=run.written,
        seconds=time.monotonic() - started,
        digest=digests.image_digest(),
    )


class _Copy:
    """The state that the threads of one copy share."""

    def __init__(
        self,
        reader: Reader,
        writer: Writer,
        digests: Digests,
        limits: Limits,
        progress: Callable[[int], None] | None,
        stop: threading.Event | None,
        journal: Durable | None,
        rate: Paced | None,
    ) -> None:
        self.received = self.covered = self.written = 0
        self._reader, self._writer, self._digests, self._limits = reader, writer, digests, limits
        self._progress, self._rate = progress, rate
        self._pool: Pool[list[Extent]] = Pool(stop=stop, interrupt=reader.interrupt)
        self._checkpoints = Checkpoints(writer, digests, journal, pool=self._pool, every_bytes=limits.checkpoint_bytes)
        self._lock, self._spare = threading.Lock(), list[memoryview]()

    def fetch_all(self, planned: tuple[Extent, ...]) -> None:
        threads = min(self._reader.depth, self._limits.threads)
        batch = self._reader.batch if isinstance(self._reader, InBatches) else 1
        step = self._reader.preferred_extent_bytes
        work = runs_within(pieces(planned, step), most=batch, most_bytes=step)
        self._pool.run(work, [self._fetch] * threads, meanwhile=self._checkpoints.take_if_due)
        wanted = sum(extent.length for extent in planned)
        if self.covered != wanted:
            raise self._mismatch(f"{self.covered} bytes were copied of {wanted} planned")
        self._checkpoints.take()

    def _fetch(self, extents: Sequence[Extent]) -> None:
        piece = Piece(extents, self._spare)
        try:
            self._retrying(piece)(self._attempt, piece)
        except TransientFault as fault:
            raise TransferInterrupted(
                source=self._reader.source, resumable_at=piece.first_missing, why=str(fault)
            ) from fault
        except Misread as error:
            raise self._mismatch(str(error)) from error

    def _attempt(self, piece: Piece) -> None:
        for each in self._streams(piece.missing()):
            self._pool.check()
            with closing(each) as stream:
                for offset, buffer in stream:
                    self._pool.check()
                    came = 0 if isinstance(buffer, Hole) else len(buffer)
                    self._count(received=came)
                    for leaf, content in piece.take(offset, buffer):
                        self._land(leaf, content)
                    if self._rate:
                        self._pool.ended.wait(self._rate.delay(came))
        if piece.left:
            raise Misread(f"the source left out {piece.left} leaves, the first at {piece.first_missing}")

    def _streams(self, extents: Sequence[Extent]) -> Iterator[Generator[tuple[int, Streamed], None, None]]:
        if isinstance(self._reader, InBatches):
            yield self._reader.stream_scattered(extents)
        else:
            yield from map(self._reader.stream, extents)

    def _land(self, first: int, content: Buffer | Hole) -> None:
        """Write whole leaves, from number `first` on, with their digests."""
        start = first * LEAF_BYTES
        if isinstance(content, Hole):
            self._writer.zero(start, len(content))
            records = ZERO_RECORD * leaf_count(len(content))
        else:
            records = self._write(start, memoryview(content))
        self._digests.put(first, records)
        self._count(covered=len(content))
        if self._progress:
            self._progress(len(content))
        self._checkpoints.landed(Extent(start=start, length=len(content)))

    def _write(self, start: int, view: memoryview) -> bytes:
        """Write whole leaves, their clusters of zeros as holes; return their records."""
        records = [self._digests.record_of(view[at : at + LEAF_BYTES]) for at in range(0, len(view), LEAF_BYTES)]
        at = 0
        for zeros, clusters in groupby(
            is_zero(view[at : at + CLUSTER_BYTES]) for at in range(0, len(view), CLUSTER_BYTES)
        ):
            part = view[at : at + CLUSTER_BYTES * len(tuple(clusters))]
            if zeros:
                self._writer.zero(start + at, len(part))
            else:
                self._writer.write(start + at, part)
                self._count(written=len(part))
            at += len(part)
        return b"".join(records)

    def _count(self, *, received: int = 0, covered: int = 0, written: int = 0) -> None:
        with self._lock:
            self.received += received
            self.covered += covered
            self.written += written

    def _retrying(self, piece: Piece) -> Retrying:
        patience = _Patience(piece, self._limits)
        return Retrying(
            retry=retry_if_exception_type(TransientFault),
            stop=stop_after_attempt(self._limits.attempts),
            wait=patience.wait,
            after=patience.start_anew,
            sleep=sleep_using_event(self._pool.ended),
            reraise=True,
        )

    def _mismatch(self, where: str) -> IntegrityMismatch:
        return IntegrityMismatch(path=str(self._writer.path), where=where)


class _Patience:
    """How long to wait after a fault. A leaf more since the last one, and the attempts are counted from 1 again."""

    def __init__(self, piece: Piece, limits: Limits) -> None:
        self._piece, self._left = piece, piece.left
        self._backoff = wait_random_exponential(limits.first_wait_s, limits.longest_wait_s)

    def start_anew(self, state: RetryCallState) -> None:
        if self._piece.left < self._left:
            self._left, state.attempt_number = self._piece.left, 1

    def wait(self, state: RetryCallState) -> float:
        fault = state.outcome.exception() if state.outcome else None
        asked_for = fault.wait_s if isinstance(fault, TransientFault) else 0.0
        wait_s = max(self._backoff(state), asked_for)
        _log.info("source failed, asking again in %.1f s attempt=%d fault=%s", wait_s, state.attempt_number, fault)
        return wait_s
