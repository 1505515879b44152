"""Bringing an image up to a later point in time: the copy loop, over a reader and a writer that know what changed.

The reader makes whole leaves of what is fetched and of what is here; the writer writes only what differs or was
fetched. Which bytes those are, and when the result counts, is not decided here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Self

from tasks.images.changes import Changes
from tasks.images.copy import CLUSTER_BYTES, CopyResult, Limits, copy
from tasks.images.digests import LEAF_BYTES, Buffer, Digests
from tasks.images.dirty import DirtyList
from tasks.images.extents import leaf_extent, merged
from tasks.images.leaves import OpenLeaf
from tasks.images.writer import Image
from tasks.images.written import Written
from tasks.models import Extent
from tasks.rate import Rate
from tasks.reader import Buffer as Streamed
from tasks.reader import Lent, Reader, Scattered, aligned_buffer

MOST_TOGETHER = 64  # leaves in a batch
MOST_SPREAD = 4  # bytes of leaves for a byte of changes, between two checkpoints

Parts = Generator[tuple[int, Streamed], None, None]

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
    todo: DirtyList,
    compare: bool = False,
    written: Written | None = None,
    limits: Limits | None = None,
    progress: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
    rate: Rate | None = None,
) -> PatchResult:
    """Fetch `changes` from an entered `reader` into `image`; return once that and its digests are durable.

    compare: write only what differs from what is here, which costs reading all of that: where it is not known what
    changed. Until the caller says that it counts, image and digests are of no point in time: `todo`, of the leaves of
    `changes`, says so, ahead of what is written. written: is told what came of the leaves that changed in part. Raises
    what `copy` raises.
    """
    writer: _Differing | _Fetched = _Differing(image, todo) if compare else _Fetched(image, todo, changes)
    limits = limits or Limits()
    patched = _Patched(reader, image, changes, digests, written, depth=min(reader.depth, limits.threads))
    spread = min(MOST_SPREAD, sum(leaf.length for leaf in todo.planned) // max(changes.length, 1))
    every_bytes = limits.checkpoint_bytes * max(spread, 1)  # of leaves, which are so much more than what is written
    limits = limits.model_copy(update={"checkpoint_bytes": every_bytes})
    result = copy(
        patched,
        changes.leaves,
        writer,
        digests=digests,
        limits=limits,
        progress=progress,
        stop=stop,
        journal=todo,
        rate=_OfTheSource(rate, patched) if rate else None,
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
    """A reader of whole leaves: what changed of them comes from the source, the rest from the image."""

    def __init__(
        self, source: Reader, image: Image, changes: Changes, digests: Digests, written: Written | None, *, depth: int
    ) -> None:
        self.size, self.preferred_extent_bytes, self.depth = source.size, source.preferred_extent_bytes, depth
        self.batch = min(MOST_TOGETHER, max(1, len(changes.leaves) // (2 * depth)))  # something to do for each thread
        self.road, self.road_reason, self.source = source.road, source.road_reason, source.source
        self.fetched_bytes = self.read_here_bytes = 0
        self._from, self._image, self._changes, self._digests, self._written = source, image, changes, digests, written
        self._lock, self._leaves = threading.Lock(), Lent(aligned_buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """The source is not ours to leave."""

    def stream(self, extent: Extent) -> Parts:
        """Yield the bytes of `extent`, whole leaves of it. See `tasks.reader.Reader`."""
        yield from self.stream_scattered([extent])

    def stream_scattered(self, extents: Sequence[Extent]) -> Parts:
        """Yield the bytes of `extents`, whole leaves. See `tasks.images.copy.InBatches`.

        A leaf that changed in part comes with its last change; the rest of one that is in doubt then, after all others.
        """
        begun, doubted = dict[int, OpenLeaf](), list[Extent]()
        for offset, buffer in self._fetched([*self._changes.of_all(extents)]):
            if self._changes.are_whole(offset, offset + len(buffer)):
                yield offset, buffer
                continue
            for leaf, at, part in _by_leaf(offset, buffer):
                start = leaf * LEAF_BYTES
                if self._changes.are_whole(start, start + 1):
                    yield start + at, part
                elif self._open(begun, leaf).put(at, part):
                    yield from self._with_rest(leaf, begun.pop(leaf).content, doubted)
        yield from self._fetched(merged(doubted))

    def interrupt(self) -> None:
        self._from.interrupt()

    def _open(self, begun: dict[int, OpenLeaf], leaf: int) -> OpenLeaf:
        """Return a leaf that changed in part, with gaps where its changes belong."""
        if leaf not in begun:
            whole = leaf_extent(leaf, size=self.size)
            gaps = [(a - whole.start, b - whole.start) for a, b in self._changes.within(whole.start, whole.end)]
            begun[leaf] = OpenLeaf(memoryview(bytearray(whole.length)), gaps)
        return begun[leaf]

    def _with_rest(self, leaf: int, changed: memoryview, doubted: list[Extent]) -> Parts:
        """Yield a leaf: what changed, and the rest as it is here; that is `doubted` and left out if it changed too."""
        whole = leaf_extent(leaf, size=self.size)
        runs = self._changes.within(whole.start, whole.end)
        parts = [changed[start - whole.start : end - whole.start] for start, end in runs]
        with self._leaves.memory(LEAF_BYTES) as memory:
            content = memory[: whole.length]
            self._image.read_into(whole.start, content)
            with self._lock:
                self.read_here_bytes += whole.length
            if self._digests.record_of(content) == self._digests.get(leaf):
                for (start, end), part in zip(runs, parts, strict=True):
                    content[start - whole.start : end - whole.start] = part
                if self._written:
                    self._written.note(leaf, self._digests.record_of(b"".join(parts)))
                yield whole.start, content
                return
        doubted += (Extent(start=start, length=end - start) for start, end in self._changes.kept(leaf))
        self._changes.doubt(leaf)
        yield from ((start, part) for (start, _), part in zip(runs, parts, strict=True))

    def _fetched(self, extents: Sequence[Extent]) -> Parts:
        for stream in self._streams(extents):
            with closing(stream):
                for offset, buffer in stream:
                    with self._lock:
                        self.fetched_bytes += len(buffer)
                    yield offset, buffer

    def _streams(self, extents: Sequence[Extent]) -> Iterator[Parts]:
        if len(extents) > 1 and isinstance(self._from, Scattered):
            yield self._from.stream_scattered(extents)
        else:
            yield from map(self._from.stream, extents)


class _OfTheSource:
    """A rate at which bytes of the source come, whatever of a leaf comes from here. See `tasks.rate.Paced`."""

    def __init__(self, rate: Rate, patched: _Patched) -> None:
        self._rate, self._patched = rate, patched
        self._counted, self._lock = 0, threading.Lock()

    def delay(self, count: int) -> float:
        with self._lock:
            came, self._counted = self._patched.fetched_bytes - self._counted, self._patched.fetched_bytes
        return self._rate.delay(came)


def _by_leaf(offset: int, buffer: Streamed) -> Iterator[tuple[int, int, Streamed]]:
    """Cut up what came; yield `(leaf, offset in it, bytes)`."""
    while buffer:
        leaf, at = divmod(offset, LEAF_BYTES)
        part, buffer = buffer[: LEAF_BYTES - at], buffer[LEAF_BYTES - at :]
        yield leaf, at, part
        offset += len(part)


class _Writing:
    """An image as a target that is not written as a whole; `todo` is told before anything is."""

    def __init__(self, image: Image, todo: DirtyList) -> None:
        self.written_bytes = self.read_here_bytes = 0
        self._image, self._todo = image, todo
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        return self._image.path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """The image is not ours to close."""

    def write(self, offset: int, buffer: Buffer) -> None:
        self._todo.ahead(offset + len(buffer))
        for at, part in self.parts(offset, memoryview(buffer)):
            self._image.write(at, part)
            with self._lock:
                self.written_bytes += len(part)

    def zero(self, offset: int, length: int) -> None:
        self._todo.ahead(offset + length)
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

    def __init__(self, image: Image, todo: DirtyList, changes: Changes) -> None:
        super().__init__(image, todo)
        self._changes = changes

    def parts(self, offset: int, content: memoryview) -> Iterable[tuple[int, memoryview]]:
        for start, end in self._changes.within(offset, offset + len(content)):
            yield start, content[start - offset : end - offset]


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
