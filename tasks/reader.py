"""What a reader of disk bytes is; every road out of vSphere has this shape."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, Self, TypeVar, runtime_checkable

from tasks.models import Extent

M = TypeVar("M", memoryview, bytearray)


def aligned_buffer(length: int) -> memoryview:
    """Return memory that begins on a page: what lies in it can be written past the page cache (open(2), O_DIRECT)."""
    return memoryview(mmap.mmap(-1, length))


class Lent(Generic[M]):
    """Memory that is lent and lent again: fresh memory costs as much as what is done with it. For several threads."""

    def __init__(self, make: Callable[[int], M]) -> None:
        self._make: Callable[[int], M] = make
        self._spare: list[M] = []
        self._lock = threading.Lock()

    @contextmanager
    def memory(self, length: int) -> Iterator[M]:
        """Lend so many bytes for the block: what was lent before, where its length is the same."""
        with self._lock:
            mine = self._spare.pop() if self._spare else None
        if mine is None or len(mine) != length:
            mine = self._make(length)
        try:
            yield mine
        finally:
            with self._lock:
                self._spare.append(mine)


def cut(extent: Extent, step: int) -> Iterator[Extent]:
    """Cut an extent at multiples of `step`, which is what is asked for at once, so that whole leaves come whole."""
    start = extent.start
    while start < extent.end:
        end = min(extent.end, start // step * step + step)
        yield Extent(start=start, length=end - start)
        start = end


def joined(runs: Iterable[tuple[int, int]], *, size: int) -> Iterator[Extent]:
    """Yield sorted runs, `(start, length)` of bytes, as extents: those that touch made one, none past the end."""
    start = end = 0
    for first, length in runs:
        if first > end:
            if end > start:
                yield Extent(start=start, length=end - start)
            start = first
        end = max(end, min(size, first + length))
    if end > start:
        yield Extent(start=start, length=end - start)


def runs_within(extents: Iterable[Extent], *, most: int, most_bytes: int) -> Iterator[list[Extent]]:
    """Yield extents in their order, up to `most` of them and `most_bytes` at a time; a larger one alone."""
    run, run_bytes = list[Extent](), 0
    for extent in extents:
        if run and (len(run) == most or run_bytes + extent.length > most_bytes):
            yield run
            run, run_bytes = [], 0
        run.append(extent)
        run_bytes += extent.length
    if run:
        yield run


class Hole:
    """So many bytes that are known to read as zeros, in place of a buffer that holds them: a slice of one is one."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> Hole:
        return Hole(len(range(*part.indices(self._length))))


Buffer = memoryview | Hole


class TransientFault(Exception):
    """The source failed in a way that a new request may survive; the copy loop decides how often to try.

    `wait_s`: how long the source itself asked to be left alone (HTTP `Retry-After`), in seconds.
    """

    def __init__(self, why: str, *, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class Reader(Protocol):
    """One disk as a source of bytes; a context manager, used as

        with FolderReader(…) as reader:
            for offset, buffer in reader.stream(Extent(start=0, length=reader.size)):
                …

    size: capacity in bytes. depth: how many threads may call `stream` at once.
    preferred_extent_bytes: how much to ask for in one `stream`; a multiple of 256 KiB.
    road: the name of the road taken, road_reason: why that one, for logs and manifest; both may change until the end.
    source: what is read, for messages.
    Entering raises a class of `tasks.errors` where the disk cannot be read: before the first byte, by name.
    """

    size: int
    depth: int
    preferred_extent_bytes: int
    road: str
    road_reason: str
    source: str

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def stream(self, extent: Extent) -> Generator[tuple[int, Buffer], None, None]:
        """Yield `(offset, buffer)`, in any order, covering `extent` once; a buffer is good until the next is asked for.

        A reader that learns on the way that nothing is stored somewhere yields a Hole.

        Closing the generator ends the request.

        One attempt: raises TransientFault where asking again may help, a class of `tasks.errors` where it will not.
        """
        ...

    def interrupt(self) -> None:
        """Wake every thread that waits in `stream`, from another thread; the reader is good only for leaving then."""
        ...


@runtime_checkable
class KnowsAllocated(Protocol):
    """A reader that knows, once entered, which parts may hold something; the others read as zeros."""

    def allocated(self) -> Sequence[Extent]:
        """Return those parts, sorted, none past the end of the disk."""
        ...


@runtime_checkable
class Scattered(Protocol):
    """A reader to which many small extents are fewer requests than each of them by itself."""

    def stream_scattered(self, extents: Sequence[Extent]) -> Generator[tuple[int, Buffer], None, None]:
        """Yield what `stream` yields of each of `extents` (sorted, none touching another), in any order."""
        ...
