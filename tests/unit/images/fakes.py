"""Readers and writers in memory that fail as a script says. They implement the protocols; they mock nothing."""

from __future__ import annotations

import random
import threading
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Self

from tasks.images.digests import LEAF_BYTES, Buffer, Digests
from tasks.images.journal import Journal
from tasks.images.raw import RawWriter
from tasks.models import Extent
from tasks.reader import TransientFault


def leaves(text: str, *, tail: int = 0) -> bytes:
    """Return content leaf by leaf: `0` a zero leaf, another character a leaf of random bytes seeded by it."""
    content = b"".join(bytes(LEAF_BYTES) if kind == "0" else random.Random(kind).randbytes(LEAF_BYTES) for kind in text)
    return content + random.Random("tail").randbytes(tail)


class FakeReader:
    """A disk in memory.

    faults: (offset, error) pairs, each raised once, by the stream that reaches the offset. omit: extents that a
    stream leaves out. stalls_at: a stream that reaches it hangs until interrupted. shuffled: chunks in any order.
    """

    road, road_reason = "fake", ""
    source = "[fake] disk.vmdk"

    def __init__(
        self,
        content: bytes,
        *,
        chunk: int = 64 * 1024,
        depth: int = 2,
        preferred: int = 4 * LEAF_BYTES,
        faults: Iterable[tuple[int, BaseException]] = (),
        omit: Iterable[int] = (),
        twice: Iterable[int] = (),
        stalls_at: int | None = None,
        shuffled: bool = False,
        on_enter: BaseException | None = None,
    ) -> None:
        self.content, self.size, self.depth, self.preferred_extent_bytes = content, len(content), depth, preferred
        self.chunk, self.faults, self.omit, self.twice = chunk, list(faults), set(omit), set(twice)
        self.stalls_at, self.shuffled, self.on_enter = stalls_at, shuffled, on_enter
        self.asked: list[Extent] = []
        self.stalling, self.interrupted = threading.Event(), threading.Event()
        self.closed = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if self.on_enter:
            raise self.on_enter
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed = True

    def stream(self, extent: Extent) -> Generator[tuple[int, memoryview], None, None]:
        with self._lock:
            self.asked.append(extent)
        offsets = list(range(extent.start, extent.end, self.chunk))
        if self.shuffled:
            random.Random(extent.start).shuffle(offsets)
        buffer = bytearray(self.chunk)
        for offset in offsets:
            self._obey_script(offset)
            for _ in range(0 if offset in self.omit else 2 if offset in self.twice else 1):
                part = self.content[offset : min(offset + self.chunk, extent.end)]
                buffer[: len(part)] = part
                yield offset, memoryview(buffer)[: len(part)]
                buffer[:] = b"\xee" * self.chunk  # a buffer is good only until the next is asked for

    def stream_scattered(self, extents: Sequence[Extent]) -> Generator[tuple[int, memoryview], None, None]:
        for extent in random.Random(len(extents)).sample(extents, len(extents)) if self.shuffled else extents:
            yield from self.stream(extent)

    def interrupt(self) -> None:
        self.interrupted.set()

    def _obey_script(self, offset: int) -> None:
        with self._lock:
            due = next((fault for fault in self.faults if offset <= fault[0] < offset + self.chunk), None)
            if due:
                self.faults.remove(due)
                raise due[1]
        if self.stalls_at is not None and offset >= self.stalls_at:
            self.stalling.set()
            self.interrupted.wait(10)
            raise TransientFault("interrupted")


class FakeWriter:
    """An image in memory; `fails` names the verbs that raise, and what."""

    path = Path("/fake/disk.raw.part")

    def __init__(self, size: int, *, fails: dict[str, BaseException] | None = None) -> None:
        self.content = bytearray(size)
        self.calls: list[str] = []
        self.fails = fails or {}
        self.written: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.close()

    def write(self, offset: int, buffer: Buffer) -> None:
        self._call("write")
        self.written.append((offset, len(buffer)))
        self.content[offset : offset + len(buffer)] = buffer

    def zero(self, offset: int, length: int) -> None:
        self._call("zero")

    def flush(self) -> None:
        self._call("flush")

    def close(self) -> None:
        self._call("close")

    def _call(self, verb: str) -> None:
        self.calls.append(verb)
        if verb in self.fails:
            raise self.fails[verb]


class ShiftingWriter(RawWriter):
    """A raw writer that puts one write in the wrong place."""

    shift: tuple[int, int] = (0, 0)

    def write(self, offset: int, buffer: Buffer) -> None:
        super().write(offset + self.shift[1] if offset == self.shift[0] else offset, buffer)


class TellingDigests(Digests):
    """A sidecar that writes into `calls` when it is flushed."""

    calls: list[str]

    def flush(self) -> None:
        self.calls.append("flush digests")
        super().flush()


class TellingJournal(Journal):
    """A journal that writes into `calls` when it is appended to."""

    calls: list[str]

    def append(self, extents: Iterable[Extent]) -> None:
        self.calls.append("append")
        super().append(extents)
