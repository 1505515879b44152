"""Bringing an image up to a later point in time: the copy loop, over a reader and a writer that know what changed.

The reader makes whole leaves of what is fetched and of what is here; the writer writes only what differs or was
fetched. Which bytes those are, and when the result counts, is not decided here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Self

from tasks.images.changes import Changes
from tasks.images.copy import CLUSTER_BYTES, CopyResult, Limits, copy
from tasks.images.digests import LEAF_BYTES, Buffer, Digests
from tasks.images.extents import leaf_extent
from tasks.images.writer import Image
from tasks.models import Extent
from tasks.rate import Rate
from tasks.reader import Reader

AHEAD = 2  # threads a connection: while one waits for the source, the others read, hash and write here
HELD_BYTES = 1024 * 1024  # at most this much of a reply is taken whole, so that its connection is free at once

_log = logging.getLogger(__name__)


class PatchResult(CopyResult):
    """What a patch did. bytes_transferred: from the source. bytes_read_here: of the image. leaves_in_doubt: fetched
    whole, since what was here was not what their digests said.
    """

    bytes_read_here: int
    leaves_in_doubt: int


def patch(
    reader: Reader,
    image: Image,
    changes: Changes,
    *,
    digests: Digests,
    compare: bool = False,
    limits: Limits | None = None,
    progress: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
    rate: Rate | None = None,
) -> PatchResult:
    """Fetch `changes` from an entered `reader` into `image`; return once that and its digests are durable.

    compare: write only what differs from what is here, which costs reading all of that: where it is not known what
    changed. Until the caller says that it counts, image and digests are of no point in time: the leaves of `changes`
    must be known to be dirty, durably, before this is called. Raises what `copy` raises.
    """
    writer: _Differing | _Fetched = _Differing(image) if compare else _Fetched(image, changes)
    limits = limits or Limits()
    patched = _Patched(reader, image, changes, digests, connections=min(reader.depth, limits.threads))
    limits = limits.model_copy(update={"threads": patched.depth})
    result = copy(
        patched, changes.leaves, writer, digests=digests, limits=limits, progress=progress, stop=stop, rate=rate
    )
    if changes.doubted:
        _log.warning("leaves were not as their digests say, and were fetched path=%s n=%d", image.path, changes.doubted)
    counted = {
        "bytes_transferred": patched.fetched_bytes,
        "bytes_written": writer.written_bytes,
        "bytes_read_here": patched.read_here_bytes + writer.read_here_bytes,
        "leaves_in_doubt": changes.doubted,
    }
    return PatchResult(**result.model_dump() | counted)


class _Patched:
    """A reader of whole leaves: what changed of them comes from the source, the rest from the image.

    connections: how many threads may be at the source at once; `depth` is of those that are at anything.
    """

    def __init__(self, source: Reader, image: Image, changes: Changes, digests: Digests, *, connections: int) -> None:
        self.size, self.preferred_extent_bytes = source.size, source.preferred_extent_bytes
        self.depth = connections * AHEAD
        self.road, self.road_reason, self.source = source.road, source.road_reason, source.source
        self.fetched_bytes = self.read_here_bytes = 0
        self._from, self._image, self._changes, self._digests = source, image, changes, digests
        self._lock, self._turns = threading.Lock(), threading.Semaphore(connections)
        self._spare: list[memoryview] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """The source is not ours to leave."""

    def stream(self, extent: Extent) -> Generator[tuple[int, memoryview], None, None]:
        """Yield the bytes of `extent`, whole leaves of it. See `tasks.reader.Reader`."""
        changed = self._changes.within(extent)
        for each, after in zip_longest(changed, changed[1:]):
            yield from self._fetched(each)
            ends_with = after.start // LEAF_BYTES if after else -1
            for leaf in sorted({each.start // LEAF_BYTES, (each.end - 1) // LEAF_BYTES} - {ends_with}):
                yield from self._kept(leaf)  # last, so that no connection is held while a leaf is hashed and written

    def interrupt(self) -> None:
        self._from.interrupt()

    def _kept(self, leaf: int) -> Generator[tuple[int, memoryview], None, None]:
        """Yield what of a leaf did not change: as it is here, or, if that is not what it was, as the source has it."""
        kept = self._changes.kept(leaf)
        if not kept:
            return
        whole = leaf_extent(leaf, size=self.size)
        with self._memory() as memory:
            content = memory[: whole.length]
            self._image.read_into(whole.start, content)
            with self._lock:
                self.read_here_bytes += whole.length
            if self._digests.record_of(content) == self._digests.get(leaf):
                for extent in kept:
                    at = extent.start - whole.start
                    yield extent.start, content[at : at + extent.length]
                return
        self._changes.doubt(leaf)
        for extent in kept:
            yield from self._fetched(extent)

    @contextmanager
    def _memory(self) -> Iterator[memoryview]:
        """Lend a leaf's worth for the block: fresh memory costs as much as what is done with it."""
        with self._lock:
            mine = self._spare.pop() if self._spare else memoryview(bytearray(LEAF_BYTES))
        try:
            yield mine
        finally:
            with self._lock:
                self._spare.append(mine)

    def _fetched(self, extent: Extent) -> Generator[tuple[int, memoryview], None, None]:
        if extent.length > HELD_BYTES:
            with self._turns:
                yield from self._streamed(extent)
            return
        held = memoryview(bytearray(extent.length))
        with self._turns:
            for offset, buffer in self._streamed(extent):
                held[offset - extent.start : offset - extent.start + len(buffer)] = buffer
        yield extent.start, held

    def _streamed(self, extent: Extent) -> Generator[tuple[int, memoryview], None, None]:
        with closing(self._from.stream(extent)) as stream:
            for offset, buffer in stream:
                with self._lock:
                    self.fetched_bytes += len(buffer)
                yield offset, buffer


class _Writing:
    """An image as a target that is not written as a whole."""

    def __init__(self, image: Image) -> None:
        self.written_bytes = self.read_here_bytes = 0
        self._image = image
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        return self._image.path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """The image is not ours to close."""

    def write(self, offset: int, buffer: Buffer) -> None:
        for at, part in self.parts(offset, memoryview(buffer)):
            self._image.write(at, part)
            with self._lock:
                self.written_bytes += len(part)

    def zero(self, offset: int, length: int) -> None:
        for at, part in self.parts(offset, memoryview(bytes(length))):
            self._image.zero(at, len(part))

    def flush(self) -> None:
        self._image.flush()

    def close(self) -> None:
        """The image is not ours to close."""

    def parts(self, offset: int, content: memoryview) -> Iterable[tuple[int, memoryview]]:
        """Yield what of the content that belongs at `offset` is to be written, and where."""
        raise NotImplementedError


class _Fetched(_Writing):
    """Writes what was fetched."""

    def __init__(self, image: Image, changes: Changes) -> None:
        super().__init__(image)
        self._changes = changes

    def parts(self, offset: int, content: memoryview) -> Iterable[tuple[int, memoryview]]:
        for extent in self._changes.within(Extent(start=offset, length=len(content))):
            yield extent.start, content[extent.start - offset : extent.end - offset]


class _Differing(_Writing):
    """Writes what is not here already, cluster by cluster."""

    def parts(self, offset: int, content: memoryview) -> Iterable[tuple[int, memoryview]]:
        here = bytearray(len(content))
        self._image.read_into(offset, memoryview(here))
        with self._lock:
            self.read_here_bytes += len(here)
        for at in range(0, len(content), CLUSTER_BYTES):
            part = content[at : at + CLUSTER_BYTES]
            if not here.startswith(part, at):  # one memcmp; comparing memoryviews costs 70 times that
                yield offset + at, part
