"""One of our readers as a process: `read_disk vddk|nbd|ssh [folder|-]`, the disk as JSON, secrets and all, on stdin.

What is allocated is streamed by as many threads as the reader takes, to nowhere, or copied, hashed, into the folder;
`-`: each buffer is copied once in memory.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tasks.images.copy import copy
from tasks.images.digests import Digests
from tasks.images.extents import leaf_aligned
from tasks.images.raw import RawWriter
from tasks.models import Extent
from tasks.reader import KnowsAllocated, Reader, aligned_buffer, cut
from tasks.transports.nbd import NbdDisk, NbdReader
from tasks.transports.ssh import SshDisk, SshReader
from tasks.transports.vddk import SLOT_BYTES, VddkDisk, VddkReader
from tests.benchmarks.child import measured

KINDS: dict[str, tuple[Any, Callable[[Any], Reader]]] = {
    "vddk": (VddkDisk, VddkReader),
    "nbd": (NbdDisk, NbdReader),
    "ssh": (SshDisk, SshReader),
}


def main(kind: str, folder: str = "") -> None:
    """Read the disk, opening it included; with a folder or `-`, open it, and then copy it there."""
    disk_class, reader_class = KINDS[kind]
    reader = reader_class(disk_class.model_validate(json.load(sys.stdin)))
    if not folder:
        measured(lambda: open_and_read(reader))
        return
    with reader:
        measured(lambda: read_all(reader, Memory().take) if folder == "-" else copy_all(reader, Path(folder)))


def open_and_read(reader: Reader) -> None:
    with reader:
        read_all(reader, lambda stream: deque(stream, maxlen=0))


def read_all(reader: Reader, take: Callable[[Iterable[tuple[int, Any]]], object]) -> None:
    with ThreadPoolExecutor(reader.depth) as pool:
        pieces = (piece for extent in wanted(reader) for piece in cut(extent, reader.preferred_extent_bytes))
        list(pool.map(lambda piece: take(reader.stream(piece)), pieces))


class Memory(threading.local):
    """Where a thread copies to, all its time: fresh memory costs more than filling it. Without the GIL meanwhile."""

    def __init__(self) -> None:
        self._place = ctypes.byref(ctypes.c_char.from_buffer(aligned_buffer(SLOT_BYTES)))

    def take(self, stream: Iterable[tuple[int, Any]]) -> None:
        place = self._place
        for _, buffer in stream:
            ctypes.memmove(place, ctypes.byref(ctypes.c_char.from_buffer(buffer)), len(buffer))


def copy_all(reader: Reader, folder: Path) -> None:
    with (
        RawWriter.create(folder / "disk.raw", size=reader.size) as writer,
        Digests.create(folder / "disk.digests", size=reader.size) as digests,
    ):
        copy(reader, leaf_aligned(wanted(reader), size=reader.size), writer, digests=digests)


def wanted(reader: Reader) -> Sequence[Extent]:
    whole = (Extent(start=0, length=reader.size),)
    return reader.allocated() if isinstance(reader, KnowsAllocated) else whole


if __name__ == "__main__":
    main(*sys.argv[1:])
