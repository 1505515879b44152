"""Reading an image back through its own format, and comparing it leaf by leaf with its digests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from tasks.errors import IntegrityMismatch
from tasks.images.digests import LEAF_BYTES, RECORD_BYTES, Buffer, Digests, leaf_count
from tasks.images.extents import leaf_aligned, pieces, whole_disk
from tasks.images.pool import Pool
from tasks.images.qemu import CONNECTIONS, qemu_nbd, takes_direct
from tasks.models import SECTOR_BYTES, Extent, ImageFormat
from tasks.nbd import ZERO, NbdClient

PIECE_BYTES = 32 * 1024 * 1024
REQUEST_BYTES = 1024 * 1024


def verify(
    path: Path,
    *,
    format: ImageFormat,
    digests: Digests,
    extents: Iterable[Extent] | None = None,
    progress: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
    connections: int = CONNECTIONS,
) -> Literal["direct", "cached"]:
    """Read `path` back and compare it with `digests`; return whether that went past the page cache.

    extents: whole leaves; None: all of it. Only what is allocated is read; what is not must have a zero record.
    progress: called with the bytes done since the last call, holes included. Raises IntegrityMismatch (how many leaves
    differ, and the first), ToolFailed, Stopped. qemu-nbd serves the image, and ends with the thread that calls.
    """
    bad = Count()
    road = compare(
        path,
        whole_disk(digests.size) if extents is None else extents,
        bad.add,
        format=format,
        digests=digests,
        progress=progress,
        stop=stop,
        connections=connections,
    )
    bad.raise_if_any(path)
    return road


def compare(
    path: Path,
    extents: Iterable[Extent],
    differs: Callable[[int], object],
    *,
    format: ImageFormat,
    digests: Digests,
    progress: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
    connections: int = CONNECTIONS,
) -> Literal["direct", "cached"]:
    """As `verify`, but of `extents` (whole leaves) only, and every leaf that differs is told to `differs`."""
    lock = threading.Lock()

    def take(piece: Extent, records: bytes, _: int) -> None:
        first = piece.start // LEAF_BYTES
        for at in differing(records, digests.records(first, leaf_count(piece.length))):
            with lock:
                differs(first + at)

    return read_back(
        path,
        extents,
        take,
        format=format,
        like=digests,
        progress=progress,
        stop=stop,
        connections=connections,
    )


def read_back(
    path: Path,
    extents: Iterable[Extent],
    take: Callable[[Extent, bytes, int], object],
    *,
    format: ImageFormat,
    like: Digests,
    progress: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
    connections: int = CONNECTIONS,
) -> Literal["direct", "cached"]:
    """Give `take` the records of `extents` (whole leaves) as the image holds them, piece by piece, in any order.

    like: of the disk's size, which is checked, and of the hash of the records. take: called by several threads with a
    piece, its records, and how many of its bytes were read: the others are holes. The rest is as for `verify`, which
    rests on this.
    """

    def work(client: NbdClient, piece: Extent, check: Callable[[], None]) -> None:
        with reading(path, piece, check):
            records, read_bytes = records_of(client, piece, like.record_of, check)
        take(piece, records, read_bytes)
        if progress:
            progress(piece.length)

    parts = pieces(extents, PIECE_BYTES)
    return on_clients(path, parts, work, format=format, size=like.size, stop=stop, connections=connections)


def on_clients(
    path: Path,
    parts: Iterable[Extent],
    work: Callable[[NbdClient, Extent, Callable[[], None]], None],
    *,
    format: ImageFormat,
    size: int,
    stop: threading.Event | None = None,
    connections: int = CONNECTIONS,
) -> Literal["direct", "cached"]:
    """Have `work` read each of `parts` of an image of `size` bytes, by several threads; return how that is read.

    work: is given a client, a part, and what to call now and then: it raises where the end has come.
    """
    direct = takes_direct(path)
    with qemu_nbd(path, format=format, connections=connections) as address, ExitStack() as stack:
        clients = [stack.enter_context(NbdClient(address)) for _ in range(connections)]
        _check_size(path, clients[0].size, size)
        pool: Pool[Extent] = Pool(stop=stop, interrupt=partial(_interrupt, clients))

        def worker(client: NbdClient) -> Callable[[Extent], None]:
            return lambda part: work(client, part, pool.check)

        pool.run(parts, [worker(client) for client in clients])
    return "direct" if direct else "cached"


def differing(records: bytes, others: bytes) -> list[int]:
    """Return the places, counted in records, at which two runs of as many records differ."""
    if records == others:
        return []
    starts = range(0, len(records), RECORD_BYTES)
    return [at // RECORD_BYTES for at in starts if records[at : at + RECORD_BYTES] != others[at : at + RECORD_BYTES]]


class Count:
    """How many leaves differ, and the first of them."""

    def __init__(self) -> None:
        self.leaves = self.first = 0

    def add(self, leaf: int) -> None:
        self.first = min(self.first, leaf) if self.leaves else leaf
        self.leaves += 1

    def raise_if_any(self, path: Path) -> None:
        """Raise IntegrityMismatch where any was told."""
        if self.leaves:
            where = f"{self.leaves} leaves of {LEAF_BYTES} bytes differ, the first at byte {self.first * LEAF_BYTES}"
            raise IntegrityMismatch(path=str(path), where=where)


def _interrupt(clients: Sequence[NbdClient]) -> None:
    for client in clients:
        client.interrupt()


def _check_size(path: Path, there: int, wanted: int) -> None:
    """QEMU rounds the size of a raw file up to a sector."""
    if there not in (wanted, -(-wanted // SECTOR_BYTES) * SECTOR_BYTES):
        raise IntegrityMismatch(path=str(path), where=f"a disk of {there} bytes, not of {wanted}")


@contextmanager
def reading(path: Path, piece: Extent, check: Callable[[], None]) -> Iterator[None]:
    """Raise IntegrityMismatch where an image cannot be read, unless that is because the end has come."""
    try:
        yield
    except OSError as error:
        check()
        where = f"reading it back failed near byte {piece.start}: {error}"
        raise IntegrityMismatch(path=str(path), where=where) from error


def records_of(
    client: NbdClient, piece: Extent, record_of: Callable[[Buffer], bytes], check: Callable[[], None]
) -> tuple[bytes, int]:
    """Return the records of a leaf-aligned piece, and how many of its bytes were read."""
    first, read_bytes = piece.start // LEAF_BYTES, 0
    found = bytearray(leaf_count(piece.length) * RECORD_BYTES)
    for leaf, record, length in _records_in(client, piece, record_of, check):
        at = (leaf - first) * RECORD_BYTES
        found[at : at + RECORD_BYTES] = record
        read_bytes += length
    return bytes(found), read_bytes


def _records_in(
    client: NbdClient, piece: Extent, record_of: Callable[[Buffer], bytes], check: Callable[[], None]
) -> Iterator[tuple[int, bytes, int]]:
    """Yield (leaf, record, length in bytes) of every leaf of `piece` that is not a hole."""
    buffer = memoryview(bytearray(REQUEST_BYTES))
    for request in pieces(_allocated(client, piece), REQUEST_BYTES):
        check()
        content = buffer[: request.length]
        client.read_into(request.start, content)
        for at in range(0, request.length, LEAF_BYTES):
            leaf = content[at : at + LEAF_BYTES]
            yield (request.start + at) // LEAF_BYTES, record_of(leaf), len(leaf)


def _allocated(client: NbdClient, piece: Extent) -> tuple[Extent, ...]:
    """Return the leaves of `piece` that the server does not promise to be zero."""
    data: list[Extent] = []
    start = piece.start
    for length, flags in client.block_status(piece.start, piece.length):
        if not flags & ZERO:
            data.append(Extent(start=start, length=length))
        start += length
    return leaf_aligned(data, size=piece.end)
