"""Bringing an image up to a later point in time: the copy loop, over a reader and a writer that know what changed.

The reader makes whole leaves of what is fetched and of what is here; the writer writes only what differs or was
fetched. Which bytes those are, and when the result counts, is not decided here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Self

from tasks.images.changes import Changes
from tasks.images.copy import CLUSTER_BYTES, CopyResult, Limits, copy
from tasks.images.digests import LEAF_BYTES, Buffer, Digests
from tasks.images.dirty import DirtyList
from tasks.images.extents import leaf_extent, runs_of
from tasks.images.held import Held
from tasks.images.writer import Image
from tasks.images.written import Written
from tasks.models import Extent
from tasks.rate import Rate
from tasks.reader import Hole, Lent, Reader, Scattered, aligned_buffer, runs_within

AHEAD = 2  # threads a connection: while one waits for the source, the others read, hash and write here
HELD_BYTES = 4 * 1024 * 1024  # at most this much of changes is taken whole, so that its connection is free at once
MOST_HELD = 64  # of them
MOST_SPREAD = 4  # bytes of leaves for a byte of changes, between two checkpoints

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
    patched = _Patched(reader, image, changes, digests, written, connections=min(reader.depth, limits.threads))
    spread = min(MOST_SPREAD, sum(leaf.length for leaf in todo.planned) // max(changes.length, 1))
    every_bytes = limits.checkpoint_bytes * max(spread, 1)  # of leaves, which are so much more than what is written
    limits = limits.model_copy(update={"threads": patched.depth, "checkpoint_bytes": every_bytes})
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
    """A reader of whole leaves: what changed of them comes from the source, the rest from the image.

    connections: how many threads may be at the source at once; `depth` is of those that are at anything.
    """

    def __init__(
        self,
        source: Reader,
        image: Image,
        changes: Changes,
        digests: Digests,
        written: Written | None,
        *,
        connections: int,
    ) -> None:
        self.size, self.preferred_extent_bytes = source.size, source.preferred_extent_bytes
        self.depth = connections * AHEAD
        self.batch = min(MOST_HELD, max(1, len(changes.leaves) // (2 * self.depth)))  # something to do for each thread
        self.road, self.road_reason, self.source = source.road, source.road_reason, source.source
        self.fetched_bytes = self.read_here_bytes = 0
        self._from, self._image, self._changes, self._digests, self._written = source, image, changes, digests, written
        self._lock, self._turns = threading.Lock(), threading.Semaphore(connections)
        self._leaves, self._held = Lent(aligned_buffer), Lent(aligned_buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """The source is not ours to leave."""

    def stream(self, extent: Extent) -> Generator[tuple[int, memoryview | Hole], None, None]:
        """Yield the bytes of `extent`, whole leaves of it. See `tasks.reader.Reader`."""
        yield from self.stream_batch([extent])

    def stream_batch(self, extents: Sequence[Extent]) -> Generator[tuple[int, memoryview | Hole], None, None]:
        """Yield the bytes of `extents`, whole leaves. See `tasks.images.copy.InBatches`.

        The rest of a leaf comes with the last change of it, when no connection is held any more.
        """
        runs = [*runs_within(self._changes.of_all(extents), most=MOST_HELD, most_bytes=HELD_BYTES)]
        for run, after in zip_longest(runs, runs[1:]):
            next_leaf = after[0].start // LEAF_BYTES if after else -1
            if sum(each.length for each in run) > HELD_BYTES:  # a long one, by itself
                with self._turns:
                    yield from self._counted(self._from.stream(run[0]))
                for leaf in sorted({run[0].start // LEAF_BYTES, (run[0].end - 1) // LEAF_BYTES} - {next_leaf}):
                    yield from self._with_rest(leaf, ())
            else:
                with self._held.memory(HELD_BYTES) as memory:
                    held = self._fetched(run, memory)
                    for leaf, parts in _by_leaf(held):
                        yield from parts if leaf == next_leaf else self._with_rest(leaf, parts)

    def interrupt(self) -> None:
        self._from.interrupt()

    def _with_rest(
        self, leaf: int, parts: Sequence[tuple[int, memoryview]]
    ) -> Generator[tuple[int, memoryview | Hole], None, None]:
        """Yield `parts` of a leaf, and its rest as it is here, or, if that is not what it was, as the source has it.

        Where the two are all of the leaf, they are one.
        """
        kept = self._changes.kept(leaf)
        if not kept:
            yield from parts
            return
        whole = leaf_extent(leaf, size=self.size)
        with self._leaves.memory(LEAF_BYTES) as memory:
            content = memory[: whole.length]
            self._image.read_into(whole.start, content)
            with self._lock:
                self.read_here_bytes += whole.length
            if self._digests.record_of(content) == self._digests.get(leaf):
                for start, part in parts:
                    content[start - whole.start : start - whole.start + len(part)] = part
                self._note(leaf, parts, whole.length - sum(each.length for each in kept))
                got = [(start, start + len(part)) for start, part in parts]
                for start, end in runs_of([*got, *((each.start, each.end) for each in kept)]):
                    yield start, content[start - whole.start : end - whole.start]
                return
        self._changes.doubt(leaf)
        yield from parts
        for run in runs_within(kept, most=1, most_bytes=HELD_BYTES):
            with self._held.memory(HELD_BYTES) as memory:
                yield from self._fetched(run, memory)

    def _note(self, leaf: int, parts: Sequence[tuple[int, memoryview]], length: int) -> None:
        """Keep a record of the parts of a leaf, where they are all `length` bytes that it has of them."""
        if self._written and sum(len(part) for _, part in parts) == length:
            content = parts[0][1] if len(parts) == 1 else b"".join(part for _, part in parts)
            self._written.note(leaf, self._digests.record_of(content))

    def _fetched(self, run: Sequence[Extent], memory: memoryview) -> list[tuple[int, memoryview]]:
        """Return the bytes of `run`, in `memory`: taken at once, so that the connection is free for the next."""
        held = Held(run, memory)
        with self._turns:
            for stream in self._streams(run):
                for offset, buffer in self._counted(stream):
                    held.put(offset, buffer)
        return held.parts()

    def _streams(self, run: Sequence[Extent]) -> Iterator[Generator[tuple[int, memoryview | Hole], None, None]]:
        if len(run) > 1 and isinstance(self._from, Scattered):
            yield self._from.stream_scattered(run)
        else:
            yield from map(self._from.stream, run)

    def _counted(
        self, opened: Generator[tuple[int, memoryview | Hole], None, None]
    ) -> Generator[tuple[int, memoryview | Hole], None, None]:
        with closing(opened) as stream:
            for offset, buffer in stream:
                with self._lock:
                    self.fetched_bytes += len(buffer)
                yield offset, buffer


class _OfTheSource:
    """A rate at which bytes of the source come, whatever of a leaf comes from here. See `tasks.rate.Paced`."""

    def __init__(self, rate: Rate, patched: _Patched) -> None:
        self._rate, self._patched = rate, patched
        self._counted, self._lock = 0, threading.Lock()

    def delay(self, count: int) -> float:
        with self._lock:
            came, self._counted = self._patched.fetched_bytes - self._counted, self._patched.fetched_bytes
        return self._rate.delay(came)


def _by_leaf(parts: Iterable[tuple[int, memoryview]]) -> Iterator[tuple[int, list[tuple[int, memoryview]]]]:
    """Yield each leaf that has any of `parts` (sorted) with what it has of them, one that lies in several cut up."""

    def cut() -> Iterator[tuple[int, memoryview]]:
        for start, content in parts:
            while content:
                length = min(len(content), LEAF_BYTES - start % LEAF_BYTES)
                yield start, content[:length]
                start, content = start + length, content[length:]

    for leaf, mine in groupby(cut(), key=lambda part: part[0] // LEAF_BYTES):
        yield leaf, list(mine)


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
